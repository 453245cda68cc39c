"""Rates that others published, for machines that cannot run their systems."""

# UPM, madvise-driven merging in a patched kernel 4.15: the best rate of merging
# pages known already (it falls to 566 MB/s as the size grows). Wei Qiu, Marcin
# Copik, Yun Wang, Alexandru Calotoiu, Torsten Hoefler: "User-guided Page Merging
# for Memory Deduplication in Serverless Systems", IEEE BigData 2023.
UPM_MERGE_BYTES_PER_SECOND = 593e6
