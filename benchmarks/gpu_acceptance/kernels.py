"""Stage 2: our Triton kernels against torch's operators, the comparisons of triton_kernels.py."""

import torch

from benchmarks import triton_kernels
from benchmarks.gpu_acceptance.results import Fail, Report
from benchmarks.gpu_acceptance.setting import first_line, joined
from nemotron_train.kernels.triton import available


def run(report: Report) -> None:
    """Compares every kernel. One that raises does not stop the others."""
    reason = available.failure(torch.device("cuda"))
    if reason:
        raise Fail(f"Triton does not compute: {reason}")
    sizes, wrong = report.setting.sizes, []
    cases = triton_kernels.cases(sizes.tokens, sizes.width)
    for count, case in enumerate(cases, start=1):
        try:
            difference, is_right = triton_kernels.difference(case)
        except Exception as error:
            difference, is_right = first_line(error), False
        rule = "bit for bit" if case.exact else "BF16 roundings"
        report.row("kernels", kernel=case.name, rule=rule, difference=difference, equal=is_right)
        if not is_right:
            wrong.append(f"{case.name} ({difference})")
        report.figure = f"{count - len(wrong)} of {count} kernels give torch's numbers"
    if wrong:
        raise Fail(f"not torch's numbers: {joined(wrong)}")
