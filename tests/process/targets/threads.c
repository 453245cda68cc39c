/* threads BOARD N MIB: N threads that read and write MIB of memory, two by way of
 * the kernel. The main thread is one of the N. */
#include "target.h"

#include <sys/uio.h>

static void *region;
static uint32_t *writes; /* of each page; the shadow */
static uint64_t pages, workers;

/* Pages that are written now and then; the others keep their first values. */
static bool changes(uint64_t page) {
  return page / 64 % 4 == 1 || (page / 64 % 4 == 2 && page % 8 < 4);
}

static void write_word(uint64_t page) {
  uint64_t number = ++writes[page];
  words_of(region, page)[number % WORDS] = written_value(page, number);
}

static void write_back(uint64_t page) {
  fill(region, page, page + 1);
  writes[page] = 0;
}

/* The same two by read(2): the kernel writes to the page. */
static void receive(int *ends, uint64_t page) {
  uint64_t number = ++writes[page], word = written_value(page, number);
  ssize_t sent = write(ends[1], &word, sizeof word);
  ssize_t got = read(ends[0], words_of(region, page) + number % WORDS, sizeof word);
  if (sent != sizeof word || got != sizeof word)
    fail("read into page %lu: %zd bytes, errno %d", page, got, errno);
}

static void receive_back(int *ends, uint64_t page) {
  uint64_t copy[WORDS], twice[WORDS];
  for (uint64_t word = 0; word < WORDS; word++)
    copy[word] = first_value(page, word);
  ssize_t sent = write(ends[1], copy, PAGE);
  ssize_t got = read(ends[0], words_of(region, page), PAGE);
  if (sent != PAGE || got != PAGE)
    fail("read of page %lu: %zd and %zd bytes, errno %d", page, sent, got, errno);
  writes[page] = 0;
  sent = write(ends[1], words_of(region, page), PAGE); /* the kernel reads it */
  got = read(ends[0], twice, PAGE);
  if (sent != PAGE || got != PAGE || memcmp(copy, twice, PAGE))
    fail("write of page %lu: %zd and %zd bytes, errno %d", page, sent, got, errno);
}

static void *work(void *argument) {
  uint64_t me = (uint64_t)argument, state = me;
  uint64_t first = pages * me / workers, stop = pages * (me + 1) / workers;
  bool by_kernel = me % 4 == 2;
  const char *who = by_kernel ? "by the kernel" : "by the program";
  struct counter *mine = counter(me, who);
  int ends[2];
  MUST(pipe(ends) == 0);
  while (!ended)
    for (uint64_t page = first; page < stop && !ended; page++) {
      verify(who, region, page, writes[page]);
      uint64_t dice = chance(&state), other = dice % pages;
      uint64_t own = first + (dice >> 8) % (stop - first);
      if (!changes(other))
        verify("by another thread", region, other, 0);
      if (changes(own)) {
        if ((dice >> 40) % 4 == 0)
          by_kernel ? receive_back(ends, own) : write_back(own);
        else
          by_kernel ? receive(ends, own) : write_word(own);
        verify(who, region, own, writes[own]);
      }
      mine->turns++;
    }
  close(ends[0]);
  close(ends[1]);
  return NULL;
}

int main(int argc, char **argv) {
  MUST(argc == 4);
  open_board(argv);
  workers = strtoul(argv[2], NULL, 10);
  pages = strtoul(argv[3], NULL, 10) << 20 >> 12;
  region = map(pages);
  writes = calloc(pages, sizeof *writes);
  fill(region, 0, pages);
  offer(0, region, pages);
  pthread_t ender = start(await_end, NULL), threads[COUNTERS];
  for (uint64_t n = 1; n < workers; n++)
    threads[n] = start(work, (void *)n);
  board->ready++;
  work((void *)0);
  for (uint64_t n = 1; n < workers; n++)
    pthread_join(threads[n], NULL);
  pthread_join(ender, NULL);
  for (uint64_t page = 0; page < pages; page++)
    verify("at the end", region, page, writes[page]);
  return 0;
}
