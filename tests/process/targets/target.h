/* What the targets share: memory whose bytes are known, and a board for the test.
 *
 * A target is started as `program BOARD-FD ARGS...`. It offers regions of private
 * anonymous memory, checks them all the time, and ends with status 0 at the end of
 * its standard input; at the first wrong byte or state it says so and exits with 1.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, REGIONS = 16, COUNTERS = 64, NAME = 24 };

/* A shared file, and the same words in targets.py. */
struct board {
  _Atomic uint64_t ready; /* counts the images of the process that got so far */
  _Atomic uint64_t region[REGIONS][2]; /* what is offered: first byte, end; or 0 */
  struct counter {
    _Atomic uint64_t turns;       /* how often this was done; grows while all is well */
    _Atomic uint64_t interrupted; /* system calls that said EINTR without a handler */
    char name[NAME];
  } counter[COUNTERS];
};

static struct board *board;
static uint64_t salt; /* makes the unique pages of this process its own */
static _Atomic bool ended;

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *why, ...) {
  char text[512];
  va_list args;
  va_start(args, why);
  int length = vsnprintf(text, sizeof text - 1, why, args);
  va_end(args);
  text[length++] = '\n';
  ssize_t told = write(2, text, length); /* one call: no two threads mix */
  (void)told;
  _exit(1);
}

/* What must not fail in the target for reasons of its own. */
#define MUST(condition) \
  do { \
    if (!(condition)) \
      fail("%s:%d: %s: errno %d", __FILE__, __LINE__, #condition, errno); \
  } while (0)

static inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 29)) * 0xd6e8feb86659fd93u;
  return x ^ (x >> 32);
}

/* A thread's own chance: the same in every run. */
static inline uint64_t chance(uint64_t *state) { return mix(*state += 0x632be5ab); }

/* Known: the same in every process. Repeated: several times in each. */
enum kind { ZERO, UNIQUE, KNOWN, REPEATED };

/* Long runs, short ones and single pages of each kind, in blocks of 64 pages. */
static inline enum kind kind_of(uint64_t page) {
  switch (page / 64 % 4) {
  case 2:
    return (enum kind)(page % 4);
  case 3:
    return page % 64 < 16 ? ZERO : page % 64 < 32 ? UNIQUE : KNOWN;
  default:
    return KNOWN;
  }
}

static inline uint64_t first_value(uint64_t page, uint64_t word) {
  switch (kind_of(page)) {
  case ZERO:
    return 0;
  case UNIQUE:
    return mix(salt << 40 ^ page << 10 ^ word) | 1;
  case REPEATED:
    page = page % 8;
    break;
  case KNOWN:
    break;
  }
  return mix(page << 10 ^ word) | 1;
}

/* Write number n of a page goes to its word n % 512 and depends on n, so that the
 * number alone says what the page holds, and the loss of any write shows. */
static inline uint64_t written_value(uint64_t page, uint64_t number) {
  return mix(~page << 32 ^ number) | 1;
}

static inline uint64_t value(uint64_t page, uint64_t word, uint64_t writes) {
  uint64_t since = (writes - word) % WORDS;
  return writes > since ? written_value(page, writes - since) : first_value(page, word);
}

static inline uint64_t *words_of(void *region, uint64_t page) {
  return (uint64_t *)((char *)region + page * PAGE);
}

static void fill(void *region, uint64_t first, uint64_t stop) {
  for (uint64_t page = first; page < stop; page++)
    for (uint64_t word = 0; word < WORDS; word++)
      words_of(region, page)[word] = first_value(page, word);
}

static void verify(const char *who, void *region, uint64_t page, uint64_t writes) {
  volatile uint64_t *words = words_of(region, page);
  for (uint64_t word = 0; word < WORDS; word++) {
    uint64_t there = words[word], right = value(page, word, writes);
    if (there != right)
      fail("%s: page %lu (%p), word %lu: %#lx and not %#lx; %lu writes; now %#lx",
           who, page, (void *)words, word, there, right, writes, words[word]);
  }
}

static void *map(uint64_t pages) {
  void *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  MUST(at != MAP_FAILED);
  return at;
}

/* Tell the test of memory to merge; of none with zero pages. */
static void offer(int number, void *region, uint64_t pages) {
  board->region[number][0] = 0;
  board->region[number][1] = (uint64_t)region + pages * PAGE;
  if (pages)
    board->region[number][0] = (uint64_t)region;
}

static struct counter *counter(int number, const char *name) {
  MUST(number < COUNTERS);
  strncpy(board->counter[number].name, name, NAME - 1);
  return &board->counter[number];
}

__attribute__((unused)) static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ull + now.tv_nsec;
}

__attribute__((unused)) static void *await_end(void *unused) {
  char byte;
  ssize_t got = read(0, &byte, 1);
  if (got < 0)
    fail("read of the standard input: errno %d", errno);
  ended = true;
  return unused;
}

__attribute__((unused)) static pthread_t start(void *(*run)(void *), void *argument) {
  pthread_t thread;
  MUST(pthread_create(&thread, NULL, run, argument) == 0);
  return thread;
}

static void open_board(char **argv) {
  int fd = atoi(argv[1]);
  board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  MUST(board != MAP_FAILED);
  salt = getpid();
}
