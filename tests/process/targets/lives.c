/* lives BOARD FIRST: threads, children and mappings that come and go, with the right
 * bytes in all of them. The main thread has role number FIRST. */
#include "target.h"

#include <spawn.h>
#include <sys/wait.h>

enum { PAGES = 1024, MS = 1000000 };

static void *region; /* constant, inherited by children */
static char self[4096];

static void one_page(uint64_t number) {
  verify("memory", region, number % PAGES, 0);
}

static void *live_shortly(void *argument) {
  uint64_t mine[WORDS]; /* its stack */
  for (uint64_t word = 0; word < WORDS; word++)
    mine[word] = first_value((uint64_t)argument, word);
  one_page((uint64_t)argument);
  verify("a new thread's stack", mine - WORDS * ((uint64_t)argument % PAGES),
         (uint64_t)argument % PAGES, 0);
  return argument;
}

static void create_threads(uint64_t turn) {
  pthread_t threads[4];
  void *result;
  for (uint64_t n = 0; n < 4; n++)
    threads[n] = start(live_shortly, (void *)((turn * 4 + n) % PAGES));
  for (uint64_t n = 0; n < 4; n++) {
    MUST(pthread_join(threads[n], &result) == 0);
    if ((uint64_t)result != (turn * 4 + n) % PAGES)
      fail("a thread returned %p", result);
  }
}

static void end_well(const char *what, pid_t pid) {
  int status;
  pid_t result = waitpid(pid, &status, 0);
  if (result != pid || status != 0)
    fail("%s: waitpid %d of %d, errno %d, status %#x", what, result, pid, errno, status);
}

static void fork_children(uint64_t turn) {
  pid_t pid = fork();
  MUST(pid >= 0);
  if (pid == 0) {
    for (uint64_t page = turn % 8; page < PAGES; page += 8)
      verify("a child", region, page, 0);
    words_of(region, turn % PAGES)[0] ^= 1; /* its own copy */
    _exit(0);
  }
  end_well("fork", pid);
}

static char *const no_more[] = {self, NULL};
static char *const nothing[] = {NULL};

static void vfork_children(uint64_t turn) {
  pid_t pid = vfork();
  MUST(pid >= 0);
  if (pid == 0) {
    if (turn % 4 == 0) /* its parent cannot be stopped meanwhile */
      nanosleep(&(struct timespec){0, 20 * MS}, NULL);
    execve(self, no_more, nothing);
    _exit(127);
  }
  end_well("vfork", pid);
}

static void spawn_children(uint64_t turn) {
  pid_t pid;
  (void)turn;
  MUST(posix_spawn(&pid, self, NULL, NULL, no_more, nothing) == 0);
  end_well("posix_spawn", pid);
}

/* Memory that is offered, moved, split and freed the way malloc does: what was
 * dropped by MADV_DONTNEED is written before it is read. */
static void change_mappings(uint64_t turn) {
  enum { SIZE = 64 };
  static uint64_t state = 3;
  uint64_t size = SIZE;
  void *at = map(size);
  fill(at, 0, size);
  offer(1, at, size);
  for (int n = 0; n < 20 && !ended; n++) {
    uint64_t dice = chance(&state), first = dice % size;
    uint64_t count = 1 + (dice >> 16) % (size - first);
    char *part = (char *)at + first * PAGE;
    switch ((dice >> 32) % 5) {
    case 0:
      MUST(mprotect(part, count * PAGE, PROT_READ) == 0);
      for (uint64_t page = first; page < first + count; page++)
        verify("read-only", at, page, 0);
      MUST(mprotect(part, count * PAGE, PROT_READ | PROT_WRITE) == 0);
      break;
    case 1:
      MUST(madvise(part, count * PAGE, MADV_DONTNEED) == 0);
      fill(at, first, first + count);
      break;
    case 2: { /* a hole, and new memory in it, which reads as zeros */
      MUST(munmap(part, count * PAGE) == 0);
      void *again = mmap(part, count * PAGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
      if (again != part) { /* another thread was faster */
        MUST(errno == EEXIST);
        offer(1, NULL, 0);
        if (first)
          munmap(at, first * PAGE);
        munmap(part + count * PAGE, (size - first - count) * PAGE);
        return;
      }
      for (uint64_t word = 0; word < count * WORDS; word++)
        if (((volatile uint64_t *)part)[word])
          fail("new memory is not zero");
      fill(at, first, first + count);
      break;
    }
    case 3: { /* as realloc: grow, by moving or else by copying */
      void *moved = mremap(at, size * PAGE, (size + 8) * PAGE, MREMAP_MAYMOVE);
      if (moved == MAP_FAILED) {
        MUST(errno == EFAULT); /* several mappings, which the kernel does not grow */
        moved = map(size + 8);
        memcpy(moved, at, size * PAGE);
        munmap(at, size * PAGE);
      }
      for (uint64_t word = 0; word < 8 * WORDS; word++)
        if (words_of(moved, size)[word])
          fail("memory that grew is not zero behind the old end");
      at = moved;
      fill(at, size, size + 8);
      size += 8;
      offer(1, at, size);
      break;
    }
    case 4:
      verify("mapped", at, first, 0);
      words_of(at, first)[7]++;
      words_of(at, first)[7]--;
      break;
    }
    for (uint64_t page = 0; page < size; page += 1 + chance(&state) % 4)
      verify("mapped", at, page, 0);
  }
  offer(1, NULL, 0);
  MUST(munmap(at, size * PAGE) == 0);
  one_page(turn);
}

/* Memory that nobody offers, equal to nothing, reads as zeros when it is dropped. */
static void drop(uint64_t turn) {
  static uint64_t *alone;
  enum { COUNT = 16 };
  if (!alone)
    alone = map(COUNT);
  for (uint64_t word = 0; word < COUNT * WORDS; word++)
    alone[word] = mix(salt << 40 ^ turn << 20 ^ word) | 1;
  MUST(madvise(alone, COUNT * PAGE, MADV_DONTNEED) == 0);
  for (uint64_t word = 0; word < COUNT * WORDS; word++)
    if (((volatile uint64_t *)alone)[word])
      fail("dropped memory is not zero");
}

static const struct {
  const char *name;
  void (*turn)(uint64_t turn);
} roles[] = {{"create threads", create_threads}, {"fork", fork_children},
             {"vfork", vfork_children},          {"posix_spawn", spawn_children},
             {"mappings", change_mappings},      {"drop", drop},
             {"memory", one_page}};
enum { ROLES = sizeof roles / sizeof *roles };

static void *work(void *argument) {
  int me = (uint64_t)argument;
  struct counter *mine = counter(me, roles[me].name);
  for (uint64_t turn = 0; !ended; turn++, mine->turns++)
    roles[me].turn(turn);
  return NULL;
}

int main(int argc, char **argv) {
  if (argc == 1) /* a child that was executed */
    return 0;
  MUST(argc == 3);
  open_board(argv);
  MUST(readlink("/proc/self/exe", self, sizeof self - 1) > 0);
  region = map(PAGES);
  fill(region, 0, PAGES);
  offer(0, region, PAGES);
  uint64_t first = strtoul(argv[2], NULL, 10) % ROLES;
  pthread_t ender = start(await_end, NULL), threads[ROLES];
  for (uint64_t n = 0; n < ROLES; n++)
    if (n != first)
      threads[n] = start(work, (void *)n);
  board->ready++;
  work((void *)first);
  for (uint64_t n = 0; n < ROLES; n++)
    if (n != first)
      pthread_join(threads[n], NULL);
  pthread_join(ender, NULL);
  return 0;
}
