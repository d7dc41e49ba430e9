"""Run transformers' common test suites over T5Gemma 2 and over our classes, and compare test by
test.

Compared is the encoder-decoder; the encoder alone and its heads, for which T5Gemma 2 has no match,
are to pass too.

    python tests/transformers_suite/run.py CHECKOUT [pytest options]

CHECKOUT is a clone of transformers at the tag of the installed version, and two packages more:

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers CHECKOUT
    pip install parameterized httpx

The source distribution on PyPI has the common suites, but neither `tests/generation` nor the tests
of a model. Exit status 1 if one of our tests fails, if T5Gemma 2 passes one that we skip, or if
we pass fewer; pytest's own if it broke off. RUN_SLOW=1 in the environment adds the slow tests,
torch.export among them.
"""

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

OURS, ALONE, THEIRS = "Qwen3EncoderDecoderModelTest", "Qwen3EncoderModelTest", "T5Gemma2ModelTest"
FOLDERS = ("t5gemma2", "qwen3_encdec")
NOT_FOR_US = {
    "test_internal_model_config_and_subconfig_are_same": "needs sub-configurations",
}


class Outcomes:
    """A pytest plugin that keeps each test's outcome:

    class -> test -> passed, failed or skipped.
    """

    def __init__(self) -> None:
        self.by_class: dict[str, dict[str, str]] = {THEIRS: {}, OURS: {}, ALONE: {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what decided a test.

        A failed subtest fails its test; pytest itself would count the two apart.
        """
        if not report.failed and (
            type(report) is not pytest.TestReport or (report.when != "call" and report.passed)
        ):
            return
        _, group, name = report.nodeid.split("::")
        outcomes = self.by_class[group]
        if outcomes.get(name) != "failed":
            outcomes[name] = report.outcome


def main() -> int:
    """Copy our test file into the checkout, run both models' tests there, print the table."""
    if len(sys.argv) < 2 or not Path(sys.argv[1], "tests/test_modeling_common.py").is_file():
        print(
            "give a checkout of transformers: python tests/transformers_suite/run.py CHECKOUT",
            file=sys.stderr,
        )
        return 2
    checkout = Path(sys.argv[1]).resolve()
    package = checkout / "tests/models/qwen3_encdec"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("test_modeling_qwen3_encdec.py"), package)

    os.chdir(checkout)
    outcomes = Outcomes()
    files = [f"tests/models/{model}/test_modeling_{model}.py" for model in FOLDERS]
    # Not the integration tests, which download checkpoints.
    status = pytest.main(
        [*files, "-q", "-k", "ModelTest and not Integration", *sys.argv[2:]], plugins=[outcomes]
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)  # it broke off, and what it has not run would not be missed

    # Every test of a common suite is collected for both; what only one of them has is its own.
    theirs, ours = outcomes.by_class[THEIRS], outcomes.by_class[OURS]
    common = sorted(theirs.keys() & ours.keys())
    print(f"\n{len(common)} common tests{'':14}{'passed':>10}{'failed':>8}{'skipped':>9}")
    for group, result in outcomes.by_class.items():
        count = Counter(result[name] for name in (result if group == ALONE else common))
        print(f"{group:30}{count['passed']:8}{count['failed']:8}{count['skipped']:9}")
    behind = [name for name in common if theirs[name] == "passed" != ours[name]]
    for name in behind:
        print(f"only T5Gemma 2 passes {name}: {NOT_FOR_US.get(name, ours[name])}")
    failed = [
        f"{group}::{name}"
        for group in (OURS, ALONE)
        for name, outcome in sorted(outcomes.by_class[group].items())
        if outcome == "failed"
    ]
    for name in failed:
        print(f"we fail {name}")
    ahead = (
        sum(ours[name] == "passed" for name in common)
        >= sum(theirs[name] == "passed" for name in common)
        > 0
    )
    return int(bool(failed) or not ahead or not set(behind) <= NOT_FOR_US.keys())


if __name__ == "__main__":
    sys.exit(main())
