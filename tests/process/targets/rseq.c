/* rseq BOARD N: N threads count per CPU in restartable sequences (rseq(2)): no count
 * is lost, or the sequences were not restarted. Status 77 where there are none. */
#include "target.h"

#if defined __x86_64__ && __has_include(<sys/rseq.h>)
#include <sched.h>
#include <sys/rseq.h>

enum { CPUS = 1024, PAGES = 1024 };

static struct slot {
  uint64_t count, padding[7];
} *slots;
static void *region;

/* int add_one(area, slots): 1, or 0 if it has to be done again. The sequence is
 * made long by a loop, so that most stops fall into it. */
int add_one(struct rseq *area, struct slot *slots);
asm(R"(
.section .data.rel.ro, "aw"
.balign 32
sequence:
  .long 0, 0
  .quad 1f, 3f - 1f, 4f
.text
.globl add_one
add_one:
  lea sequence(%rip), %rax
  mov %rax, 8(%rdi)
1:
  mov 4(%rdi), %ecx # the CPU
  shl $6, %rcx
  mov (%rsi, %rcx), %rdx
  mov $2000, %r8d
2:
  dec %r8d
  jnz 2b
  inc %rdx
  mov %rdx, (%rsi, %rcx)
3:
  movq $0, 8(%rdi)
  mov $1, %eax
  ret
  .byte 0x0f, 0xb9, 0x3d # an invalid instruction with the signature
  .long 0x53053053
4:
  xor %eax, %eax
  ret
)");

static void *work(void *argument) {
  uint64_t me = (uint64_t)argument, turn = 0;
  struct counter *mine = counter(me, "counting");
  struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
  for (; !ended; turn++) {
    while (!add_one(area, slots))
      ;
    verify("memory", region, turn % PAGES, 0);
    mine->turns++;
  }
  return (void *)turn;
}

int main(int argc, char **argv) {
  MUST(argc == 3);
  open_board(argv);
  if (__rseq_size == 0)
    return 77;
  slots = map(CPUS * sizeof *slots / PAGE);
  region = map(PAGES);
  fill(region, 0, PAGES);
  offer(0, region, PAGES);
  uint64_t count = strtoul(argv[2], NULL, 10), sum = 0, counted = 0;
  pthread_t ender = start(await_end, NULL), threads[COUNTERS];
  for (uint64_t n = 1; n < count; n++)
    threads[n] = start(work, (void *)n);
  board->ready++;
  sum += (uint64_t)work((void *)0);
  for (uint64_t n = 1; n < count; n++) {
    void *result;
    pthread_join(threads[n], &result);
    sum += (uint64_t)result;
  }
  pthread_join(ender, NULL);
  for (int cpu = 0; cpu < CPUS; cpu++)
    counted += slots[cpu].count;
  if (counted != sum)
    fail("%lu counted, and %lu times", counted, sum);
  return 0;
}
#else
int main(void) { return 77; }
#endif
