// A program written against the proposed ABI: madvise(addr, length, 26).
//
//   program rounds THREADS    merge equal pages, write, merge again, in each thread
//   program leftovers         the same, twice: then nothing of ours is left in it
//   program singles           objects of one page, which may grow
//   program again             merge, write, merge again: it takes no more mappings
//   program errors            what is no range, and what cannot merge
//   program other             advise another process (process_madvise)
//   program wait              merge once for each line read, and say what came back
//   program grow              mremap of merged memory must not show the pool
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define MADV_MERGE 26
#define PAGE 4096L
#define PAGES 24L
#define ZERO 5
#define CHECK(yes) \
  do { \
    if (!(yes)) { \
      fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #yes, strerror(errno)); \
      exit(1); \
    } \
  } while (0)

static char *fresh(long pages) {
  char *at = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(at != MAP_FAILED);
  return at;
}

static void fill(char *at, long pages, int seed) {
  for (long n = 0; n < pages; n++) {
    if (n == ZERO) {
      memset(at + n * PAGE, 0, PAGE);
      continue;
    }
    unsigned state = (unsigned)(seed * 1000 + n + 1);
    for (long i = 0; i < PAGE; i++) at[n * PAGE + i] = (char)(rand_r(&state) | 1);
  }
}

static int holds(char *at, long pages, int seed) {
  char *other = fresh(pages);
  fill(other, pages, seed);
  int same = memcmp(at, other, pages * PAGE) == 0;
  munmap(other, pages * PAGE);
  return same;
}

// The frame of a page; 0 for whoever may not know.
static uint64_t frame(char *at) {
  uint64_t entry = 0;
  volatile char touched = *at;
  (void)touched;
  int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  CHECK(fd >= 0);
  CHECK(pread(fd, &entry, 8, (off_t)((uintptr_t)at / PAGE * 8)) == 8);
  close(fd);
  return entry & ((1ULL << 55) - 1);
}

static int shared(char *one, char *two) {
  return frame(one) == frame(two);
}

static void *rounds(void *argument) {
  int seed = (int)(intptr_t)argument;
  char *one = fresh(PAGES), *two = fresh(PAGES), *zeros = fresh(1);
  int told = frame(zeros) != 0;
  for (int round = 0; round < 3; round++) {
    fill(one, PAGES, seed + round);
    fill(two, PAGES, seed + round);
    CHECK(madvise(one, PAGES * PAGE, MADV_MERGE) == 0);
    CHECK(madvise(two, PAGES * PAGE, MADV_MERGE) == 0);
    CHECK(holds(one, PAGES, seed + round));
    CHECK(holds(two, PAGES, seed + round));
    for (long n = 0; told && n < PAGES; n++) CHECK(shared(one + n * PAGE, two + n * PAGE));
    if (told) CHECK(shared(one + ZERO * PAGE, zeros));
    for (long n = 0; n < PAGES; n++) two[n * PAGE] ^= 2;
    for (long n = 0; told && n < PAGES; n++) CHECK(!shared(one + n * PAGE, two + n * PAGE));
    CHECK(holds(one, PAGES, seed + round));
  }
  munmap(one, PAGES * PAGE);
  munmap(two, PAGES * PAGE);
  return 0;
}

static void in_threads(int count) {
  pthread_t threads[64];
  for (int n = 0; n < count; n++)
    CHECK(!pthread_create(&threads[n], 0, rounds, (void *)(intptr_t)(100 * n)));
  for (int n = 0; n < count; n++) CHECK(!pthread_join(threads[n], 0));
}

// Objects of one page: they share, part and share again, and may grow.
static void singles(void) {
  char *one = fresh(1), *two = fresh(1), *grown;
  int told = frame(one) != 0;
  for (int round = 0; round < 3; round++) {
    fill(one, 1, 40 + round);
    fill(two, 1, 40 + round);
    CHECK(!madvise(one, PAGE, MADV_MERGE));
    CHECK(!madvise(two, PAGE, MADV_MERGE));
    if (told) CHECK(shared(one, two));
    CHECK(holds(one, 1, 40 + round) && holds(two, 1, 40 + round));
    two[0] ^= 2;
    if (told) CHECK(!shared(one, two));
    CHECK(holds(one, 1, 40 + round));
  }
  CHECK(!madvise(two, PAGE, MADV_MERGE));
  grown = mremap(one, PAGE, 16 * PAGE, MREMAP_MAYMOVE);
  CHECK(grown != MAP_FAILED);
  CHECK(holds(grown, 1, 42));
  for (long at = PAGE; at < 16 * PAGE; at++) CHECK(grown[at] == 0);
  fill(grown, 16, 7);
  CHECK(!madvise(grown, 16 * PAGE, MADV_MERGE));
  CHECK(holds(grown, 16, 7));
  munmap(grown, 16 * PAGE);
  munmap(two, PAGE);
}

// How many descriptors there are, and how many mappings.
static void count(long *files, long *mappings) {
  DIR *listing = opendir("/proc/self/fd");
  FILE *maps = fopen("/proc/self/maps", "re");
  CHECK(listing && maps);
  for (*files = 0; readdir(listing);) ++*files;
  for (*mappings = 0; !feof(maps);) *mappings += fgetc(maps) == '\n';
  fclose(maps);
  closedir(listing);
}

static void leftovers(void) {
  long files[2], mappings[2];
  count(files, mappings);
  in_threads(1);
  singles();
  count(files, mappings);  // now the thread's stack is there, and malloc's second heap
  in_threads(1);
  singles();
  count(files + 1, mappings + 1);
  CHECK(files[0] == files[1]);
  CHECK(mappings[0] == mappings[1]);
}

static void again(void) {
  char *at = fresh(PAGES);
  long files, first, now;
  for (int round = 0; round < 6; round++) {
    for (long n = 0; n < PAGES; n++) at[n * PAGE] = (char)(n + 1);
    CHECK(!madvise(at, PAGES * PAGE, MADV_MERGE));
    count(&files, round ? &now : &first);
    CHECK(!round || now <= first);
  }
}

static int result(char *at, size_t size, int advice) {
  errno = 0;
  return madvise(at, size, advice) ? errno : 0;
}

static void errors(void) {
  char *at = fresh(8), *shm;
  fill(at, 8, 1);
  CHECK(result(at + 1, PAGE, MADV_MERGE) == EINVAL);
  CHECK(result(at, (size_t)-1, MADV_MERGE) == EINVAL);
  CHECK(result(at, (size_t)-PAGE, MADV_MERGE) == EINVAL);
  CHECK(result(at, 0, MADV_MERGE) == 0);
  CHECK(result(at, 1, MADV_MERGE) == 0);
  CHECK(result(at, 8 * PAGE, 99) == EINVAL);
  CHECK(result(at, 8 * PAGE, MADV_NORMAL) == 0);
  munmap(at + 4 * PAGE, PAGE);
  CHECK(result(at, 8 * PAGE, MADV_MERGE) == ENOMEM);
  CHECK(holds(at, 4, 1));
  CHECK(result(0, PAGE, MADV_MERGE) == ENOMEM);
  shm = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  memset(shm, 7, 4 * PAGE);
  CHECK(result(shm, 4 * PAGE, MADV_MERGE) == 0);
  CHECK(shm[0] == 7);
}

static void other(void) {
  char *at = fresh(PAGES);
  int line[2];
  CHECK(!pipe(line));
  fill(at, PAGES, 3);
  pid_t child = fork();
  if (!child) {
    char letter;
    fill(at, PAGES, 4);  // pages of its own
    CHECK(read(line[0], &letter, 1) == 1);
    exit(!holds(at, PAGES, 4));
  }
  struct timespec moment = {0, 100000000};
  nanosleep(&moment, 0);
  int pidfd = (int)syscall(SYS_pidfd_open, child, 0);
  CHECK(pidfd >= 0);
  struct iovec pieces[2] = {{at, 2 * PAGE}, {at + 4 * PAGE, 4 * PAGE}};
  CHECK(syscall(SYS_process_madvise, pidfd, pieces, 2, MADV_MERGE, 0) == 6 * PAGE);
  CHECK(syscall(SYS_process_madvise, pidfd, pieces, 2, MADV_MERGE, 1) == -1 && errno == EINVAL);
  CHECK(syscall(SYS_process_madvise, 0, pieces, 2, MADV_MERGE, 0) == -1 && errno == EBADF);
  CHECK(holds(at, PAGES, 3));
  CHECK(write(line[1], "x", 1) == 1);
  int status;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static void wait_for_lines(void) {
  char *at = fresh(PAGES), line[16];
  fill(at, PAGES, 5);
  while (fgets(line, sizeof line, stdin)) {
    printf("%d\n", result(at, PAGES * PAGE, MADV_MERGE));
    fflush(stdout);
    CHECK(holds(at, PAGES, 5));
  }
}

static void grow(void) {
  char *small = fresh(8), *big = fresh(16);
  fill(small, 8, 6);
  fill(big, 16, 6);
  CHECK(!madvise(big, 16 * PAGE, MADV_MERGE));
  CHECK(!madvise(small, 8 * PAGE, MADV_MERGE));
  char *grown = mremap(small, 8 * PAGE, 12 * PAGE, MREMAP_MAYMOVE);
  if (grown == MAP_FAILED) {
    CHECK(errno == EFAULT);
    CHECK(holds(small, 8, 6));
  } else {
    for (long i = 8 * PAGE; i < 12 * PAGE; i++) CHECK(grown[i] == 0);
  }
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  if (!strcmp(what, "rounds")) in_threads(atoi(argv[2]));
  else if (!strcmp(what, "leftovers")) leftovers();
  else if (!strcmp(what, "singles")) singles();
  else if (!strcmp(what, "again")) again();
  else if (!strcmp(what, "errors")) errors();
  else if (!strcmp(what, "other")) other();
  else if (!strcmp(what, "wait")) wait_for_lines();
  else if (!strcmp(what, "grow")) grow();
  else CHECK(!"a known word");
  return 0;
}
