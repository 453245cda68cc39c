/* calls BOARD FIRST: each thread is blocked in one kind of system call most of the
 * time and checks its outcome. The main thread has kind number FIRST.
 *
 * EINTR without a handler of ours is counted on the board, and the call repeated:
 * the kernel says it by itself after any stop to some kinds (signal(7)), and the
 * test knows which. Everything else unexpected is an error. */
#include "target.h"

#include <linux/futex.h>
#include <netinet/in.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

enum { MS = 1000000 };
#define HANDLED (SIGRTMIN + 1) /* has a handler */
#define WAITED (SIGRTMIN + 2)  /* is blocked, and waited for */

static __thread volatile uint64_t handled; /* how often a handler of ours ran here */
static __thread struct counter *mine;
static int semaphores, messages; /* of System V: they outlive us if we are killed */

static void handler(int number) {
  (void)number;
  handled++;
}

static void expect(const char *what, bool right, long result) {
  if (!right)
    fail("%s: result %ld, errno %d (%s)", what, result, errno, strerror(errno));
}

/* Make a call again while it says EINTR; each time is counted. */
#define CALL(result, ...) \
  do { \
    errno = 0; \
    result = (__VA_ARGS__); \
    if (result == -1 && errno == EINTR) \
      mine->interrupted++; \
  } while (result == -1 && errno == EINTR && !ended)

/* A duration: not shorter than asked, but for `slack`, where the kernel hands out
 * the rest rounded. EINTR starts it anew, so a longer one is right. */
static void lasted(const char *what, uint64_t since, uint64_t asked, uint64_t slack) {
  uint64_t took = now_ns() - since;
  if (took + slack < asked)
    fail("%s: %lu ns and not %lu", what, took, asked);
}

static struct timespec span_of(uint64_t ns) {
  return (struct timespec){ns / 1000000000, ns % 1000000000};
}

/* Calls with a timeout. */

static void by_nanosleep(uint64_t asked) {
  struct timespec span = span_of(asked), rest;
  uint64_t since = now_ns();
  int result = nanosleep(&span, &rest);
  expect("nanosleep", result == 0, result);
  lasted("nanosleep", since, asked, 0);
}

static void by_clock_nanosleep(uint64_t asked) {
  struct timespec span = span_of(asked);
  uint64_t since = now_ns();
  int result = clock_nanosleep(CLOCK_MONOTONIC, 0, &span, NULL);
  expect("clock_nanosleep", result == 0, result);
  lasted("clock_nanosleep", since, asked, 0);
}

static void by_absolute_sleep(uint64_t asked) {
  uint64_t since = now_ns();
  struct timespec until = span_of(since + asked);
  int result = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
  expect("clock_nanosleep, absolute", result == 0, result);
  lasted("clock_nanosleep, absolute", since, asked, 0);
}

static void by_poll(uint64_t asked) {
  static __thread int ends[2];
  if (!ends[1])
    MUST(pipe(ends) == 0);
  struct pollfd one = {ends[0], POLLIN, 0};
  uint64_t since = now_ns();
  int result = poll(&one, 1, asked / MS);
  expect("poll", result == 0 && one.revents == 0, result);
  lasted("poll", since, asked / MS * MS, 0);
}

/* A mask for the time of the call, and the thread's own one behind it. */
static sigset_t all_but_one(void) {
  sigset_t mask;
  sigfillset(&mask);
  sigdelset(&mask, SIGWINCH);
  return mask;
}

static void own_mask(const char *what) {
  sigset_t now;
  pthread_sigmask(SIG_SETMASK, NULL, &now);
  for (int number = 1; number < 32; number++)
    if (sigismember(&now, number) != (number == SIGUSR2))
      fail("%s: signal %d in the mask: %d", what, number, sigismember(&now, number));
}

static void by_ppoll(uint64_t asked) {
  sigset_t mask = all_but_one();
  struct timespec span = span_of(asked);
  uint64_t since = now_ns();
  int result = ppoll(NULL, 0, &span, &mask);
  expect("ppoll", result == 0, result);
  lasted("ppoll", since, asked, MS);
  own_mask("ppoll");
}

static void by_select(uint64_t asked) {
  struct timeval span = {0, asked / 1000};
  uint64_t since = now_ns();
  int result = select(0, NULL, NULL, NULL, &span);
  expect("select", result == 0, result);
  lasted("select", since, asked, MS);
}

static void by_pselect(uint64_t asked) {
  sigset_t mask = all_but_one();
  struct timespec span = span_of(asked);
  uint64_t since = now_ns();
  int result = pselect(0, NULL, NULL, NULL, &span, &mask);
  expect("pselect", result == 0, result);
  lasted("pselect", since, asked, MS);
  own_mask("pselect");
}

static void by_epoll(uint64_t asked) {
  static __thread int fd;
  if (!fd)
    MUST((fd = epoll_create1(0)) > 0);
  struct epoll_event event;
  uint64_t since = now_ns();
  int result;
  CALL(result, epoll_wait(fd, &event, 1, asked / MS));
  expect("epoll_wait", result == 0 || ended, result);
  if (!ended)
    lasted("epoll_wait", since, asked / MS * MS, 0);
}

static void by_epoll_pwait(uint64_t asked) {
  static __thread int fd;
  if (!fd)
    MUST((fd = epoll_create1(0)) > 0);
  sigset_t mask = all_but_one();
  struct epoll_event event;
  uint64_t since = now_ns();
  int result;
  CALL(result, epoll_pwait(fd, &event, 1, asked / MS, &mask));
  expect("epoll_pwait", result == 0 || ended, result);
  if (!ended)
    lasted("epoll_pwait", since, asked / MS * MS, 0);
  own_mask("epoll_pwait");
}

static void by_futex(uint64_t asked) {
  uint32_t word = 7;
  struct timespec span = span_of(asked);
  uint64_t since = now_ns();
  int result = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 7, &span, NULL, 0);
  expect("futex", result == -1 && errno == ETIMEDOUT, result);
  lasted("futex", since, asked, 0);
}

static void by_sem_timedwait(uint64_t asked) {
  sem_t semaphore;
  sem_init(&semaphore, 0, 0);
  uint64_t since = now_ns();
  struct timespec until = span_of(since + asked);
  int result = sem_clockwait(&semaphore, CLOCK_MONOTONIC, &until);
  expect("sem_clockwait", result == -1 && errno == ETIMEDOUT, result);
  lasted("sem_clockwait", since, asked, 0);
}

static void by_cond_wait(uint64_t asked) {
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t never = PTHREAD_COND_INITIALIZER;
  pthread_mutex_lock(&mutex);
  uint64_t since = now_ns();
  struct timespec until = span_of(since + asked);
  int result;
  while ((result = pthread_cond_clockwait(&never, &mutex, CLOCK_MONOTONIC, &until)) == 0)
    ; /* it may wake without a reason */
  expect("pthread_cond_clockwait", result == ETIMEDOUT, result);
  lasted("pthread_cond_clockwait", since, asked, 0);
  pthread_mutex_unlock(&mutex);
}

static void by_semtimedop(uint64_t asked) {
  struct sembuf down = {0, -1, 0};
  struct timespec span = span_of(asked);
  uint64_t since = now_ns();
  int result;
  CALL(result, semtimedop(semaphores, &down, 1, &span));
  expect("semtimedop", (result == -1 && errno == EAGAIN) || ended, result);
  if (!ended)
    lasted("semtimedop", since, asked, 0);
}

static void by_sigtimedwait(uint64_t asked) {
  sigset_t one;
  sigemptyset(&one);
  sigaddset(&one, SIGUSR2); /* blocked, and never sent */
  struct timespec span = span_of(asked);
  uint64_t since = now_ns();
  int result;
  CALL(result, sigtimedwait(&one, NULL, &span));
  expect("sigtimedwait", (result == -1 && errno == EAGAIN) || ended, result);
  if (!ended)
    lasted("sigtimedwait", since, asked, 0);
}

static void by_recv_timeout(uint64_t asked) {
  static __thread int ends[2];
  if (!ends[1])
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
  struct timeval span = {0, asked / 1000};
  MUST(setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &span, sizeof span) == 0);
  char byte;
  uint64_t since = now_ns();
  ssize_t result;
  CALL(result, recv(ends[0], &byte, 1, 0));
  expect("recv with a timeout", (result == -1 && errno == EAGAIN) || ended, result);
  if (!ended)
    lasted("recv with a timeout", since, asked, 8 * MS); /* in ticks */
}

/* Calls that somebody ends: the prompter, once for each time it is asked. */

struct prompt {
  _Atomic bool wanted;
  pthread_t thread;
  int fd;
  uint64_t said; /* so far */
};
enum { READ, ACCEPT, RECVMSG, MSGRCV, SIGWAITINFO, PAUSE, SIGSUSPEND, LOCK, FUTEX, PROMPTS };
static struct prompt prompts[PROMPTS];
static _Atomic uint32_t futex_word;
static int lock_file;

static void say(int kind, struct prompt *prompt) {
  uint64_t number = prompt->said, word = mix(number);
  if (kind != PAUSE && kind != SIGSUSPEND) { /* those may miss it, and ask on */
    prompt->said++;
    prompt->wanted = false;
  }
  switch (kind) {
  case READ:
  case RECVMSG:
    MUST(write(prompt->fd, &word, sizeof word) == sizeof word);
    break;
  case ACCEPT: {
    struct sockaddr_in to;
    socklen_t size = sizeof to;
    MUST(getsockname(prompt->fd, (struct sockaddr *)&to, &size) == 0);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    MUST(connect(fd, (struct sockaddr *)&to, size) == 0);
    MUST(send(fd, &word, sizeof word, MSG_NOSIGNAL) == sizeof word);
    close(fd);
    break;
  }
  case MSGRCV: {
    struct { long type; uint64_t word; } message = {5, word};
    MUST(msgsnd(messages, &message, sizeof word, 0) == 0);
    break;
  }
  case SIGWAITINFO:
    MUST(pthread_sigqueue(prompt->thread, WAITED,
                          (union sigval){.sival_int = (int)number}) == 0);
    break;
  case PAUSE:
  case SIGSUSPEND:
    MUST(pthread_kill(prompt->thread, HANDLED) == 0);
    break;
  case LOCK:
    MUST(flock(lock_file, LOCK_UN) == 0);
    break;
  case FUTEX:
    futex_word = number + 1;
    syscall(SYS_futex, &futex_word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    break;
  }
}

static void *prompter(void *unused) {
  while (!ended) {
    struct timespec span = span_of(2 * MS);
    int result = nanosleep(&span, NULL);
    expect("nanosleep", result == 0, result);
    for (int kind = 0; kind < PROMPTS; kind++)
      if (prompts[kind].wanted)
        say(kind, &prompts[kind]);
  }
  return unused;
}

static uint64_t ask(int kind) {
  prompts[kind].thread = pthread_self();
  uint64_t number = prompts[kind].said;
  prompts[kind].wanted = true;
  return number;
}

static void right_word(const char *what, uint64_t word, uint64_t number) {
  if (word != mix(number))
    fail("%s: %#lx is not word %lu", what, word, number);
}

static void by_read(uint64_t unused) {
  (void)unused;
  static int ends[2];
  if (!ends[1]) {
    MUST(pipe(ends) == 0);
    prompts[READ].fd = ends[1];
  }
  uint64_t word, number = ask(READ);
  ssize_t result = read(ends[0], &word, sizeof word);
  expect("read", result == sizeof word, result);
  right_word("read", word, number);
}

static void by_accept(uint64_t unused) {
  (void)unused;
  static int listener;
  if (!listener) {
    MUST((listener = socket(AF_INET, SOCK_STREAM, 0)) > 0);
    MUST(listen(listener, 5) == 0); /* on a port of the kernel's choice */
    prompts[ACCEPT].fd = listener;
  }
  uint64_t word, number = ask(ACCEPT);
  int fd = accept(listener, NULL, NULL);
  expect("accept", fd > 0, fd);
  ssize_t result = recv(fd, &word, sizeof word, 0);
  expect("recv", result == sizeof word, result);
  right_word("accept", word, number);
  close(fd);
}

static void by_recvmsg(uint64_t unused) {
  (void)unused;
  static int ends[2];
  if (!ends[1]) {
    MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends) == 0);
    prompts[RECVMSG].fd = ends[1];
  }
  uint64_t word, number = ask(RECVMSG);
  struct iovec piece = {&word, sizeof word};
  struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
  ssize_t result = recvmsg(ends[0], &message, 0);
  expect("recvmsg", result == sizeof word, result);
  right_word("recvmsg", word, number);
}

static void by_msgrcv(uint64_t unused) {
  (void)unused;
  uint64_t number = ask(MSGRCV);
  struct { long type; uint64_t word; } message;
  ssize_t result = msgrcv(messages, &message, sizeof message.word, 5, 0);
  expect("msgrcv", result == sizeof message.word, result);
  right_word("msgrcv", message.word, number);
}

static void by_sigwaitinfo(uint64_t unused) {
  (void)unused;
  sigset_t one;
  sigemptyset(&one);
  sigaddset(&one, WAITED);
  pthread_sigmask(SIG_BLOCK, &one, NULL);
  siginfo_t info;
  uint64_t number = ask(SIGWAITINFO);
  int result;
  do {
    CALL(result, sigwaitinfo(&one, &info));
  } while (result == -1 && errno == EINTR && prompts[SIGWAITINFO].wanted);
  if (ended && result == -1)
    return;
  expect("sigwaitinfo", result == WAITED, result);
  expect("the value of sigwaitinfo", info.si_value.sival_int == (int)number,
         info.si_value.sival_int);
  expect("the sender of sigwaitinfo", info.si_pid == getpid(), info.si_pid);
}

static void by_pause(uint64_t unused) {
  (void)unused;
  uint64_t before = handled;
  ask(PAUSE);
  int result = pause();
  prompts[PAUSE].wanted = false;
  expect("pause", result == -1 && errno == EINTR, result);
  expect("the handler of pause", handled > before, handled);
}

static void by_sigsuspend(uint64_t unused) {
  (void)unused;
  sigset_t mask, own;
  sigemptyset(&mask);
  sigaddset(&mask, HANDLED);
  pthread_sigmask(SIG_BLOCK, &mask, &own);
  mask = all_but_one();
  sigdelset(&mask, HANDLED);
  uint64_t before = handled;
  ask(SIGSUSPEND);
  int result = sigsuspend(&mask);
  prompts[SIGSUSPEND].wanted = false;
  expect("sigsuspend", result == -1 && errno == EINTR, result);
  expect("the handler of sigsuspend", handled == before + 1, handled - before);
  own_mask("sigsuspend");
  pthread_sigmask(SIG_SETMASK, &own, NULL);
}

static void by_flock(uint64_t unused) {
  (void)unused;
  static int fd;
  char path[40];
  if (!fd) {
    MUST((lock_file = memfd_create("lock", 0)) > 0);
    sprintf(path, "/proc/self/fd/%d", lock_file);
    MUST((fd = open(path, 2 /* for reading and writing, another description */)) > 0);
  }
  MUST(flock(lock_file, LOCK_EX) == 0);
  uint64_t number = ask(LOCK);
  int result = flock(fd, LOCK_EX);
  expect("flock", result == 0, result);
  expect("the holder of the lock", prompts[LOCK].said == number + 1, 0);
  MUST(flock(fd, LOCK_UN) == 0);
}

static void by_futex_for_ever(uint64_t unused) {
  (void)unused;
  uint32_t number = ask(FUTEX);
  while (futex_word <= number) {
    long result = syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, number, NULL, NULL, 0);
    expect("futex for ever", result == 0 || (result == -1 && errno == EAGAIN), result);
  }
}

static void by_wait4(uint64_t asked) {
  pid_t pid = fork();
  MUST(pid >= 0);
  if (pid == 0) {
    usleep(asked / 1000);
    _exit(asked % 251);
  }
  int status;
  pid_t result = waitpid(pid, &status, 0);
  expect("waitpid", result == pid, result);
  expect("the status of waitpid",
         WIFEXITED(status) && WEXITSTATUS(status) == (int)(asked % 251), status);
}

enum { MEMORY_PAGES = 1024 };
static void *region;

static void by_reading(uint64_t number) {
  verify("memory", region, number % MEMORY_PAGES, 0);
}

static const struct {
  const char *name;
  void (*call)(uint64_t asked);
} kinds[] = {{"nanosleep", by_nanosleep},
             {"clock_nanosleep", by_clock_nanosleep},
             {"absolute_sleep", by_absolute_sleep},
             {"poll", by_poll},
             {"ppoll", by_ppoll},
             {"select", by_select},
             {"pselect", by_pselect},
             {"epoll_wait", by_epoll},
             {"epoll_pwait", by_epoll_pwait},
             {"futex", by_futex},
             {"sem_timedwait", by_sem_timedwait},
             {"cond_wait", by_cond_wait},
             {"semtimedop", by_semtimedop},
             {"sigtimedwait", by_sigtimedwait},
             {"recv_timeout", by_recv_timeout},
             {"read", by_read},
             {"accept", by_accept},
             {"recvmsg", by_recvmsg},
             {"msgrcv", by_msgrcv},
             {"sigwaitinfo", by_sigwaitinfo},
             {"pause", by_pause},
             {"sigsuspend", by_sigsuspend},
             {"flock", by_flock},
             {"futex_for_ever", by_futex_for_ever},
             {"wait4", by_wait4},
             {"reading", by_reading}};
enum { KINDS = sizeof kinds / sizeof *kinds };
static atomic_int working; /* the prompter must outlive those who ask it */

static void *work(void *argument) {
  int me = (uint64_t)argument;
  uint64_t state = me;
  sigset_t mask;
  sigemptyset(&mask);
  sigaddset(&mask, SIGUSR2);
  pthread_sigmask(SIG_BLOCK, &mask, NULL);
  mine = counter(me, kinds[me].name);
  while (!ended) {
    kinds[me].call((1 + chance(&state) % 40) * MS + chance(&state) % MS);
    mine->turns++;
  }
  working--;
  return NULL;
}

static void *prompt_all(void *unused) {
  prompter(NULL);
  while (working) { /* whoever asked just before the end */
    for (int kind = 0; kind < PROMPTS; kind++)
      if (prompts[kind].wanted)
        say(kind, &prompts[kind]);
    usleep(1000);
  }
  return unused;
}

int main(int argc, char **argv) {
  MUST(argc == 3);
  open_board(argv);
  region = map(MEMORY_PAGES);
  fill(region, 0, MEMORY_PAGES);
  offer(0, region, MEMORY_PAGES);
  struct sigaction action = {.sa_handler = handler};
  sigaction(HANDLED, &action, NULL);
  uint64_t first = strtoul(argv[2], NULL, 10) % KINDS;
  pthread_t ender = start(await_end, NULL), threads[KINDS];
  working = KINDS;
  MUST((semaphores = semget(IPC_PRIVATE, 1, 0600)) >= 0);
  MUST((messages = msgget(IPC_PRIVATE, 0600)) >= 0);
  pthread_t other = start(prompt_all, NULL);
  for (uint64_t n = 0; n < KINDS; n++)
    if (n != first)
      threads[n] = start(work, (void *)n);
  board->ready++;
  work((void *)first);
  for (uint64_t n = 0; n < KINDS; n++)
    if (n != first)
      pthread_join(threads[n], NULL);
  pthread_join(other, NULL);
  pthread_join(ender, NULL);
  semctl(semaphores, 0, IPC_RMID);
  msgctl(messages, IPC_RMID, NULL);
  return 0;
}
