"""Run transformers' common test suites over T5Gemma 2 and over our classes, and compare test by test.

    python tests/transformers_suite/run.py CHECKOUT [pytest options]

CHECKOUT is a clone of transformers at the tag of the installed version; it needs `pip install parameterized`. Exit
status 1 if one of our tests fails, if T5Gemma 2 passes one that we skip, or if we pass fewer. RUN_SLOW=1 in the
environment adds the slow tests, torch.export among them.
"""

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

OURS = "qwen3_encdec"
THEIRS = "t5gemma2"
NOT_FOR_US = {"test_internal_model_config_and_subconfig_are_same": "needs a configuration with sub-configurations"}


class Outcomes:
    """A pytest plugin that keeps each test's outcome: model -> test -> passed, failed or skipped."""

    def __init__(self) -> None:
        self.by_model: dict[str, dict[str, str]] = {THEIRS: {}, OURS: {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what decided a test. A failed subtest fails its test; pytest itself would count the two apart."""
        if not report.failed and (type(report) is not pytest.TestReport or (report.when != "call" and report.passed)):
            return
        file, _, test = report.nodeid.partition("::")
        outcomes = self.by_model[Path(file).parent.name]
        name = test.rpartition("::")[2]
        if outcomes.get(name) != "failed":
            outcomes[name] = report.outcome


def main() -> int:
    """Copy our test file into the checkout, run both models' tests there, print the table."""
    if len(sys.argv) < 2 or not Path(sys.argv[1], "tests/test_modeling_common.py").is_file():
        print("give a checkout of transformers: python tests/transformers_suite/run.py CHECKOUT", file=sys.stderr)
        return 2
    checkout = Path(sys.argv[1]).resolve()
    package = checkout / "tests/models" / OURS
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name(f"test_modeling_{OURS}.py"), package)

    os.chdir(checkout)
    outcomes = Outcomes()
    files = [f"tests/models/{model}/test_modeling_{model}.py" for model in (THEIRS, OURS)]
    # Not the integration tests, which download checkpoints.
    pytest.main([*files, "-q", "-k", "ModelTest and not Integration", *sys.argv[2:]], plugins=[outcomes])

    # Every test of a common suite is collected for both; what only one of them has is its own.
    theirs, ours = outcomes.by_model[THEIRS], outcomes.by_model[OURS]
    common = sorted(theirs.keys() & ours.keys())
    print(f"\n{len(common)} common tests{'passed':>10}{'failed':>8}{'skipped':>9}")
    for model, result in outcomes.by_model.items():
        count = Counter(result[name] for name in common)
        print(f"{model:16}{count['passed']:10}{count['failed']:8}{count['skipped']:9}")
    behind = [name for name in common if theirs[name] == "passed" != ours[name]]
    for name in behind:
        print(f"only T5Gemma 2 passes {name}: {NOT_FOR_US.get(name, ours[name])}")
    failed = [name for name, outcome in sorted(ours.items()) if outcome == "failed"]
    for name in failed:
        if name not in behind:
            print(f"we fail {name}")
    ahead = sum(ours[name] == "passed" for name in common) >= sum(theirs[name] == "passed" for name in common) > 0
    return int(bool(failed) or not ahead or not set(behind) <= NOT_FOR_US.keys())


if __name__ == "__main__":
    sys.exit(main())
