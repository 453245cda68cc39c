"""One module a row. Each measures in a process of its own, by `measure(options)`."""

# Name of the module, and the row's title. In the order of the table.
ROWS = {
    "second_copy": "Second copy, 4 KiB pages",
    "huge_pages": "Second copy, huge pages",
    "first_copy": "First copy",
    "scattered": "Every tenth page different",
    "other_process": "Second copy, another process",
    "engines": "By engine, two other processes",
    "one_page": "One page a call",
    "one_page_1gib": "One page, beside 1 GiB",
    "supervised": "MADV_MERGE under sksm run",
    "idle": "An epoch of the scanner, nothing happens",
    "second_merge": "Merging what is merged",
    "peak_memory": "Peak memory while merging",
    "own_cost": "Own cost",
}
