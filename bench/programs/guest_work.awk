# Work such as an interpreter does: strings made of numbers, and kept in a table.
#
#   awk -v given="SEED ROUNDS" -f guest_work.awk

BEGIN {
  split(given, number, " ")
  x = number[1]
  for (i = 0; i < number[2]; i++) {
    x = (x * 1103 + 12345) % 1000003
    held[i % 50000] = "object " x " of round " i
  }
  for (i = 0; i in held; i++) {
    split(held[i], word, " ")
    total = (total * 31 + word[2] + word[5]) % 1000003
  }
  print total
}
