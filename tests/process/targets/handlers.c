/* handlers BOARD: a program whose signal handlers take a long time. */
#include "target.h"

#include <sys/time.h>

enum { PAGES = 512, MS = 1000000 };

static void *region;
static struct counter *ticks;

static void handle(int number) {
  (void)number;
  uint64_t since = now_ns();
  while (now_ns() - since < 100 * MS)
    verify("in a handler", region, mix(now_ns()) % PAGES, 0);
  ticks->turns++;
}

int main(int argc, char **argv) {
  MUST(argc == 2);
  open_board(argv);
  region = map(PAGES);
  fill(region, 0, PAGES);
  offer(0, region, PAGES);
  ticks = counter(1, "handlers");
  struct counter *mine = counter(0, "between");
  struct sigaction action = {.sa_handler = handle, .sa_flags = SA_RESTART};
  MUST(sigaction(SIGALRM, &action, NULL) == 0);
  sigset_t all, none;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &none);
  pthread_t ender = start(await_end, NULL);
  pthread_sigmask(SIG_SETMASK, &none, NULL);
  struct itimerval every = {{0, 120000}, {0, 120000}};
  MUST(setitimer(ITIMER_REAL, &every, NULL) == 0);
  board->ready++;
  for (uint64_t page = 0; !ended; page++, mine->turns++)
    verify("between handlers", region, page % PAGES, 0);
  pthread_join(ender, NULL);
  return 0;
}
