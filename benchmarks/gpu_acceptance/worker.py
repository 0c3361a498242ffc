"""The process of one stage: `python -m ….worker TARGET REPORT WORK PRETEND`.

Its exit code is 0 whenever the report has a verdict.
"""

import importlib
import os
import sys
import traceback
from pathlib import Path

from benchmarks.gpu_acceptance.results import Fail, Report, Skip, Verdict
from benchmarks.gpu_acceptance.setting import Setting, first_line


def main(target: str, path: str, work: str, pretend: str) -> int:
    """Run the stage and write its verdict."""
    setting = Setting(Path(work), pretend == "True")
    report = Report(Path(path), setting)
    verdict, reason = Verdict.passed, ""
    try:
        if setting.pretend:
            _pretend()
        os.chdir(work)
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(report)
    except Skip as skip:
        verdict, reason = Verdict.skipped, str(skip)
    except Fail as fail:
        verdict, reason = Verdict.failed, str(fail)
    except BaseException as error:  # whatever it is, the later stages must run
        traceback.print_exc()
        verdict, reason = Verdict.failed, first_line(error)
    report.end(verdict, reason)
    return 0


def _pretend() -> None:
    """Pretend an H200 and NCCL, for the whole process."""
    import torch

    from tests.platform.pretend import python_view, run

    python_view.install()
    run.call_gloo_nccl()
    torch.set_num_threads(1)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a library's thread must not hold the process
