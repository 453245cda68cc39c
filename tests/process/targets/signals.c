/* signals BOARD FIRST: signals all the time, each of which must arrive, in order and
 * with what was sent, on the right stack, under the right mask. The main thread has
 * role number FIRST. */
#include "target.h"

#include <sched.h>
#include <sys/time.h>

enum { STACK_PAGES = 16, PAGES = 1024, AHEAD = 20, MS = 1000000 };

static void *region; /* constant pages, read by handlers */
static struct counter *ticks;
static uid_t uid;
static pid_t pid;
#define FIRST_QUEUED (SIGRTMIN + 3) /* and one more for each receiver behind it */
#define WAITED (SIGRTMIN + 2)

/* A handler's stack is offered memory, too: the kernel writes its frames there. */
static __thread char *stack;

static void on_stack(bool right) {
  char here;
  if (right != (&here >= stack && &here < stack + STACK_PAGES * PAGE))
    fail("a handler at %p, the other stack at %p", (void *)&here, (void *)stack);
}

static void use_stack(int number) {
  stack = map(STACK_PAGES);
  offer(1 + number, stack, STACK_PAGES);
  stack_t other = {.ss_sp = stack, .ss_size = STACK_PAGES * PAGE};
  MUST(sigaltstack(&other, NULL) == 0);
}

/* The timer: 1 kHz, restarting, to any thread; those without a stack use their own. */

static void tick(int number, siginfo_t *info, void *context) {
  (void)context;
  uint64_t kept[64];
  int error = errno;
  for (int n = 0; n < 64; n++)
    kept[n] = first_value(n, number);
  if (number != SIGALRM || info->si_code != SI_KERNEL)
    fail("a tick is signal %d, code %d", number, info->si_code);
  on_stack(stack != NULL);
  verify("in a handler", region, mix(ticks->turns) % PAGES, 0);
  for (int n = 0; n < 64; n++)
    if (((volatile uint64_t *)kept)[n] != first_value(n, number))
      fail("a handler's own words changed");
  ticks->turns++;
  errno = error;
}

/* Queued signals: receiver n gets 0, 1, 2, ... by signal FIRST_QUEUED + n. */

enum { RECEIVERS = 3 };
static _Atomic bool interrupted_last; /* receiver 1 has ended */
static struct receiver {
  _Atomic bool ready;
  pthread_t thread;
  _Atomic uint64_t received;
  uint64_t sent;
} receivers[RECEIVERS];

static void receive(int number, siginfo_t *info, void *context) {
  (void)context;
  struct receiver *mine = &receivers[number - FIRST_QUEUED];
  if (info->si_value.sival_int != (int)mine->received || info->si_code != SI_QUEUE ||
      info->si_pid != pid || info->si_uid != uid || info->si_signo != number)
    fail("signal %d: value %d and not %d; code %d, from %d", number,
         info->si_value.sival_int, (int)mine->received, info->si_code, info->si_pid);
  if (!pthread_equal(pthread_self(), mine->thread))
    fail("signal %d in the wrong thread", number);
  on_stack(mine != &receivers[1]);
  sigset_t now;
  pthread_sigmask(SIG_SETMASK, NULL, &now);
  if (!sigismember(&now, number) || !sigismember(&now, SIGALRM))
    fail("the mask of a handler lacks its own");
  mine->received++;
  board->counter[22 + number - FIRST_QUEUED].turns++;
}

static void send(int number) {
  struct receiver *to = &receivers[number];
  if (!to->ready || to->sent - to->received >= AHEAD)
    return;
  union sigval what = {.sival_int = (int)to->sent++};
  int error = pthread_sigqueue(to->thread, FIRST_QUEUED + number, what);
  if (error && !ended) /* at the end it may be gone */
    fail("sigqueue: errno %d", error);
}

static void *send_all(void *unused) {
  struct counter *mine = counter(20, "sender");
  while (!ended) {
    for (int n = 0; n < RECEIVERS; n++)
      send(n);
    mine->turns++;
    sched_yield();
  }
  while (!interrupted_last) { /* it sees the end after one more handler */
    send(1);
    usleep(1000);
  }
  return unused;
}

static void get_ready(int number) {
  receivers[number].thread = pthread_self();
  receivers[number].ready = true;
}

static uint64_t received(int number) { return receivers[number].received; }

/* Number 0 is in user mode most of the time, on the other stack. */
static void compute(uint64_t turn) {
  if (turn == 0) {
    use_stack(0);
    get_ready(0);
  }
  verify("under fire", region, turn % PAGES, 0);
}

/* Number 1 reads a pipe that stays empty: EINTR after each handler, and only then. */
static void be_interrupted(uint64_t turn) {
  static int ends[2];
  if (turn == 0) {
    MUST(pipe(ends) == 0);
    sigset_t alarm;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &alarm, NULL);
    get_ready(1);
  }
  char byte;
  uint64_t before = received(1);
  ssize_t result = read(ends[0], &byte, 1);
  if (result != -1 || errno != EINTR)
    fail("read of an empty pipe: %zd, errno %d", result, errno);
  if (received(1) == before && !ended)
    fail("EINTR without a handler");
  interrupted_last = ended;
}

/* Number 2 blocks the signals for a while, unblocks them, sleeps: masks stay. */
static void change_masks(uint64_t turn) {
  static uint64_t state = 7;
  if (turn == 0) {
    use_stack(2);
    get_ready(2);
  }
  sigset_t mask, now;
  sigemptyset(&mask);
  for (int number = 1; number <= SIGRTMAX; number++)
    if (chance(&state) % 2 && number != 32 && number != 33 && number != SIGKILL &&
        number != SIGSTOP) /* those cannot be blocked, or are the library's */
      sigaddset(&mask, number);
  MUST(pthread_sigmask(SIG_SETMASK, &mask, NULL) == 0);
  uint64_t before = received(2);
  if (turn % 2) {
    struct timespec span = {0, 2 * MS};
    while (nanosleep(&span, &span) == -1)
      if (errno != EINTR)
        fail("nanosleep: errno %d", errno);
  } else {
    for (int n = 0; n < 50; n++)
      verify("masked", region, (turn + n) % PAGES, 0);
  }
  pthread_sigmask(SIG_SETMASK, NULL, &now);
  for (int number = 1; number <= SIGRTMAX; number++)
    if (sigismember(&now, number) != sigismember(&mask, number))
      fail("signal %d in the mask: %d", number, sigismember(&now, number));
  if (sigismember(&mask, FIRST_QUEUED + 2) && received(2) != before)
    fail("a blocked signal came");
}

/* Sends itself signals that are blocked, and fetches them by sigwaitinfo. */
static void wait_for_own(uint64_t turn) {
  sigset_t one;
  sigemptyset(&one);
  sigaddset(&one, WAITED);
  pthread_sigmask(SIG_BLOCK, &one, NULL);
  for (int n = 0; n < 5; n++)
    MUST(pthread_sigqueue(pthread_self(), WAITED,
                          (union sigval){.sival_int = (int)turn * 5 + n}) == 0);
  for (int n = 0; n < 5;) {
    siginfo_t info;
    int result = sigwaitinfo(&one, &info);
    if (result == -1 && errno == EINTR)
      continue; /* a tick, or what the kernel says after a stop */
    if (result != WAITED || info.si_value.sival_int != (int)turn * 5 + n)
      fail("sigwaitinfo: %d, value %d", result, info.si_value.sival_int);
    n++;
  }
}

/* A restarting handler is not to be seen by these. */
static void be_restarted(uint64_t turn) {
  static int ends[2];
  if (turn == 0) {
    use_stack(4);
    MUST(pipe(ends) == 0);
  }
  uint64_t word = mix(turn), there;
  MUST(write(ends[1], &word, sizeof word) == sizeof word);
  ssize_t result = read(ends[0], &there, sizeof there);
  if (result != sizeof there || there != word)
    fail("read under ticks: %zd, errno %d", result, errno);
}

static const struct {
  const char *name;
  void (*turn)(uint64_t turn);
} roles[] = {{"compute", compute},
             {"be interrupted", be_interrupted},
             {"change masks", change_masks},
             {"wait for own", wait_for_own},
             {"be restarted", be_restarted}};
enum { ROLES = sizeof roles / sizeof *roles };

static void *work(void *argument) {
  int me = (uint64_t)argument;
  struct counter *mine = counter(me, roles[me].name);
  for (uint64_t turn = 0; !ended; turn++, mine->turns++)
    roles[me].turn(turn);
  return NULL;
}

static void handle(int number, void (*handler)(int, siginfo_t *, void *), int flags) {
  struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
  sigemptyset(&action.sa_mask);
  sigaddset(&action.sa_mask, SIGALRM);
  MUST(sigaction(number, &action, NULL) == 0);
}

int main(int argc, char **argv) {
  MUST(argc == 3);
  open_board(argv);
  pid = getpid();
  uid = getuid();
  region = map(PAGES);
  fill(region, 0, PAGES);
  offer(0, region, PAGES);
  ticks = counter(21, "ticks");
  for (int n = 0; n < RECEIVERS; n++)
    counter(22 + n, "received");
  uint64_t first = strtoul(argv[2], NULL, 10) % ROLES;
  handle(SIGALRM, tick, SA_ONSTACK | SA_RESTART);
  handle(FIRST_QUEUED, receive, SA_ONSTACK | SA_RESTART);
  handle(FIRST_QUEUED + 1, receive, 0);
  handle(FIRST_QUEUED + 2, receive, SA_ONSTACK);
  sigset_t all, none;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &none);
  pthread_t ender = start(await_end, NULL), sender = start(send_all, NULL);
  pthread_sigmask(SIG_SETMASK, &none, NULL);
  struct itimerval every = {{0, 1000}, {0, 1000}};
  MUST(setitimer(ITIMER_REAL, &every, NULL) == 0);
  pthread_t threads[ROLES];
  for (uint64_t n = 0; n < ROLES; n++)
    if (n != first)
      threads[n] = start(work, (void *)n);
  board->ready++;
  work((void *)first);
  for (uint64_t n = 0; n < ROLES; n++)
    if (n != first)
      pthread_join(threads[n], NULL);
  pthread_join(sender, NULL);
  pthread_join(ender, NULL);
  return 0;
}
