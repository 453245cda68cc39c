/* registers BOARD FIRST: each thread keeps known values in one set of registers,
 * in user mode and across system calls, and looks whether they are still there.
 * The main thread has set number FIRST. x86-64 only. */
#include "target.h"

#include <asm/prctl.h>
#include <sys/syscall.h>

enum { SPINS = 20000, FLAGS = 0xcd5, ALWAYS = 0x202 /* interrupts on, bit 1 */ };

/* All but the stack pointer, in the order of `keep_integers`. */
__attribute__((used)) static const uint64_t integers[15] = {
    0x8123456789abcd01, 0x123456789abcde02, 0xfedcba9876543203, 0x0f1e2d3c4b5a6904,
    0x1111222233334405, 0xaaaabbbbccccdd06, 0x5555666677778807, 0x9999000011112208,
    0xdeadbeefcafef009, 0x0badf00ddeadbe0a, 0xffffffff0000000b, 0x00000000ffffff0c,
    0x8000000000000d0d, 0x7fffffffffffff0e, 0x0123012301230f0f};

/* uint64_t keep_integers(rounds): 0, or which register was wrong, counted from 1:
 * 16 is the stack pointer, 17 the red zone below it. Nothing is saved while the
 * rounds run but on the stack, as in the inner loop of a program. */
uint64_t keep_integers(uint64_t rounds);
/* The same across poll(NULL, 0, 1), whose registers it keeps or knows. */
uint64_t keep_call(void);
/* uint64_t keep_flags(flags, spins): the flags after spinning with these. */
uint64_t keep_flags(uint64_t flags, uint64_t spins);
asm(R"(
.text
.macro keep_all
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  sub $24, %rsp
  movq $0, 8(%rsp)
  mov %rsp, 16(%rsp)
.endm
.macro back
9:
  cld
  mov 8(%rsp), %rax
  add $24, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
.endm
.macro must_equal what, with, number
  cmp \what, \with
  je 1f
  movq $\number, 8(%rsp)
  jmp 9b
1:
.endm
.macro red_zone do
.irp below, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128
  \do \below
.endr
.endm
.macro paint below
  movq $-\below, -\below(%rsp)
.endm
.macro painted below
  cmpq $-\below, -\below(%rsp)
  je 1f
  movq $17, 8(%rsp)
  jmp 9b
1:
.endm

  jmp keep_integers
  back
.globl keep_integers
keep_integers:
  keep_all
  mov %rdi, (%rsp)
  red_zone paint
  .set n, 0
.irp r, rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15
  mov integers+n(%rip), %\r
  .set n, n + 8
.endr
2:
  .set n, 0
.irp r, rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15
  must_equal integers+n(%rip), %\r, n / 8 + 1
  .set n, n + 8
.endr
  must_equal %rsp, 16(%rsp), 16
  red_zone painted
  decq (%rsp)
  jnz 2b
  jmp 9b

  back
.globl keep_call
keep_call:
  keep_all
  red_zone paint
  .set n, 0
.irp r, rbx, rbp, r8, r9, r10, r12, r13, r14, r15
  mov integers+n(%rip), %\r
  .set n, n + 8
.endr
  mov $7, %eax
  xor %edi, %edi
  xor %esi, %esi
  mov $1, %edx
  syscall
  must_equal $0, %rax, 21
  must_equal $0, %rdi, 22
  must_equal $0, %rsi, 23
  must_equal $1, %rdx, 24
  .set n, 0
.irp r, rbx, rbp, r8, r9, r10, r12, r13, r14, r15
  must_equal integers+n(%rip), %\r, n / 8 + 31
  .set n, n + 8
.endr
  must_equal %rsp, 16(%rsp), 16
  red_zone painted
  jmp 9b

.globl keep_flags
keep_flags:
  mov %rsi, %rcx
  push %rdi
  popfq
1:
  loop 1b # leaves the flags alone
  pushfq
  cld
  pop %rax
  ret
)");

/* long keep_SET(in, out, spins): load registers from `in`, spin, store them to
 * `out`. With no spins, poll(NULL, 0, 1) instead, and its result is returned. */
#define KEEPER(name) long name(const void *in, void *out, uint64_t spins)
KEEPER(keep_sse);
KEEPER(keep_avx);
KEEPER(keep_avx512);
KEEPER(keep_x87);
asm(R"(
.macro spin_or_call
  mov %rdi, %r8
  mov %rsi, %r9
  mov %rdx, %rcx
  xor %eax, %eax
  test %rcx, %rcx
  jz 2f
1:
  dec %rcx
  jnz 1b
  jmp 3f
2:
  mov $7, %eax
  xor %edi, %edi
  xor %esi, %esi
  mov $1, %edx
  syscall
3:
.endm
.globl keep_sse, keep_avx, keep_avx512, keep_x87
keep_sse:
.irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
  movups 16 * \r(%rdi), %xmm\r
.endr
  spin_or_call
.irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
  movups %xmm\r, 16 * \r(%r9)
.endr
  ret
keep_avx:
.irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
  vmovups 32 * \r(%rdi), %ymm\r
.endr
  spin_or_call
.irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
  vmovups %ymm\r, 32 * \r(%r9)
.endr
  vzeroupper
  ret
keep_avx512:
.irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
  vmovups 64 * \r(%rdi), %zmm\r
.endr
.irp r, 0, 1, 2, 3, 4, 5, 6, 7
  kmovq 2048 + 8 * \r(%rdi), %k\r
.endr
  spin_or_call
.irp r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
  vmovups %zmm\r, 64 * \r(%r9)
.endr
.irp r, 0, 1, 2, 3, 4, 5, 6, 7
  kmovq %k\r, 2048 + 8 * \r(%r9)
.endr
  vzeroupper
  ret
keep_x87: # eight registers of ten bytes, control words of x87 and SSE
.irp r, 7, 6, 5, 4, 3, 2, 1, 0
  fldt 10 * \r(%rdi)
.endr
  fldcw 80(%rdi)
  ldmxcsr 84(%rdi)
  spin_or_call
  fnstcw 80(%r9)
  stmxcsr 84(%r9)
  ldmxcsr default_mxcsr(%rip)
.irp r, 0, 1, 2, 3, 4, 5, 6, 7
  fstpt 10 * \r(%r9)
.endr
  fninit
  ret
.section .rodata
default_mxcsr: .long 0x1f80
.text
)");

static void compare(const char *set, const unsigned char *in,
                    const unsigned char *out, size_t size, long result) {
  if (result)
    fail("%s: poll returned %ld", set, result);
  for (size_t at = 0; at < size; at++)
    if (in[at] != out[at])
      fail("%s: byte %zu is %#x and not %#x", set, at, out[at], in[at]);
}

static void by_keeper(const char *set, KEEPER((*keep)), size_t size, uint64_t seed) {
  static __thread unsigned char in[2112], out[2112];
  for (size_t at = 0; at < size; at++)
    in[at] = mix(seed << 16 ^ at);
  if (keep == keep_x87) { /* numbers, and rounding that is not the default */
    for (int n = 0; n < 8; n++) {
      in[10 * n + 9] = 0x40;
      in[10 * n + 8] = n;
      in[10 * n + 7] |= 0x80;
    }
    memcpy(in + 80, &(uint32_t){0x0c7f}, 4);
    memcpy(in + 84, &(uint32_t){seed % 2 ? 0x7fa1 : 0xbf80}, 4);
    memset(out, 0, sizeof out), out[82] = in[82], out[83] = in[83];
  }
  compare(set, in, out, size, keep(in, out, seed % 8 ? SPINS : 0));
}

static void integers_turn(uint64_t turn) {
  (void)turn;
  uint64_t wrong = keep_integers(SPINS / 16);
  if (wrong)
    fail("integer register %lu changed", wrong);
}

static void call_turn(uint64_t turn) {
  (void)turn;
  uint64_t wrong = keep_call();
  if (wrong)
    fail("register %lu changed in a system call", wrong);
}

static void flags_turn(uint64_t turn) {
  uint64_t flags = (mix(turn) & FLAGS) | ALWAYS, there = keep_flags(flags, SPINS);
  if (there != flags)
    fail("flags are %#lx and not %#lx", there, flags);
}

static void sse_turn(uint64_t turn) { by_keeper("SSE", keep_sse, 256, turn); }
static void x87_turn(uint64_t turn) { by_keeper("x87", keep_x87, 88, turn); }

static void avx_turn(uint64_t turn) {
  if (__builtin_cpu_supports("avx"))
    by_keeper("AVX", keep_avx, 512, turn);
  else
    call_turn(turn);
}

static void avx512_turn(uint64_t turn) {
  if (__builtin_cpu_supports("avx512bw"))
    by_keeper("AVX-512", keep_avx512, 2048 + 64, turn);
  else
    call_turn(turn);
}

static void segments_turn(uint64_t turn) {
  static __thread uint64_t own, of_gs;
  uint64_t self, there;
  own = of_gs = mix(turn ^ (uint64_t)&own);
  MUST(syscall(SYS_arch_prctl, ARCH_SET_GS, &of_gs) == 0);
  for (int n = 0; n < SPINS; n++) {
    asm volatile("mov %%fs:0, %0\n mov %%gs:0, %1" : "=r"(self), "=r"(there));
    if (self != (uint64_t)pthread_self() || there != of_gs || own != of_gs)
      fail("fs or gs changed: %#lx, %#lx", self, there);
  }
}

enum { MEMORY_PAGES = 2048 };
static void *region;

static void memory_turn(uint64_t turn) {
  verify("memory", region, turn % MEMORY_PAGES, 0);
}

static const struct {
  const char *name;
  void (*turn)(uint64_t turn);
} sets[] = {{"integers", integers_turn}, {"call", call_turn},
            {"flags", flags_turn},       {"x87", x87_turn},
            {"sse", sse_turn},           {"avx", avx_turn},
            {"avx512", avx512_turn},     {"segments", segments_turn},
            {"memory", memory_turn}};
enum { SETS = sizeof sets / sizeof *sets };

static void *work(void *argument) {
  int me = (uint64_t)argument;
  struct counter *mine = counter(me, sets[me].name);
  while (!ended)
    sets[me].turn(mine->turns++);
  return NULL;
}

int main(int argc, char **argv) {
  MUST(argc == 3);
  open_board(argv);
  region = map(MEMORY_PAGES);
  fill(region, 0, MEMORY_PAGES);
  offer(0, region, MEMORY_PAGES);
  uint64_t first = strtoul(argv[2], NULL, 10) % SETS;
  pthread_t ender = start(await_end, NULL), threads[SETS];
  for (uint64_t n = 0; n < SETS; n++)
    if (n != first)
      threads[n] = start(work, (void *)n);
  board->ready++;
  work((void *)first);
  for (uint64_t n = 0; n < SETS; n++)
    if (n != first)
      pthread_join(threads[n], NULL);
  pthread_join(ender, NULL);
  return 0;
}
