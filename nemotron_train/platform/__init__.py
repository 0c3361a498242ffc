"""The machine: its device, its process groups, and what lets Megatron-Core run without a GPU."""

import os

# torch reads this at its first allocation: blocks of 2 MiB and more get huge pages. On a virtual
# machine a BF16 step of the 9M benchmark model then takes 1,500 page faults instead of 15,000,
# and its copies a fifth of the time (docs/log.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
