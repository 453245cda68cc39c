/* execs BOARD N: a process of N threads, any of which executes the same program in
 * its place again and again. */
#include "target.h"

#include <poll.h>

enum { PAGES = 512, MS = 1000000 };

static void *region;
static char **arguments;
static uint64_t threads, born_ns;
static _Atomic uint64_t executing, complete;

static bool told_to_end(void) {
  struct pollfd input = {0, POLLIN, 0};
  MUST(poll(&input, 1, 0) >= 0);
  return input.revents != 0;
}

static void *work(void *argument) {
  uint64_t me = (uint64_t)argument;
  struct counter *mine = counter(me, "thread of an image");
  for (uint64_t page = me;; page += threads) {
    verify("memory", region, page % PAGES, 0);
    mine->turns++;
    /* While one executes, a thread cannot be created: EAGAIN (copy_fs(), fork.c). */
    if (!complete || now_ns() - born_ns < 40 * MS || executing || born_ns % threads != me)
      continue;
    executing = 1; /* one of them; the kernel ends the others */
    if (told_to_end())
      exit(0);
    execv("/proc/self/exe", arguments);
    fail("execv: errno %d", errno);
  }
  return NULL;
}

int main(int argc, char **argv) {
  MUST(argc == 3);
  open_board(argv);
  arguments = argv;
  threads = strtoul(argv[2], NULL, 10);
  for (int number = 0; number < REGIONS; number++)
    board->region[number][0] = 0; /* of the image before */
  region = map(PAGES);
  fill(region, 0, PAGES);
  offer(0, region, PAGES);
  born_ns = now_ns();
  for (uint64_t n = 1; n < threads; n++)
    start(work, (void *)n);
  complete = 1;
  counter(COUNTERS - 1, "images")->turns++;
  board->ready++;
  work((void *)0);
}
