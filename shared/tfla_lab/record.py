"""What a result file says about where it comes from; and the record of a test run.

    python -m tfla_lab.record FILE [pytest arguments]

runs the test suite and writes its outcome, with device, versions and date, to FILE.
"""

import collections
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]


def describe_machine() -> dict:
    """{"device", "versions", "date", "commit"} of this machine, now."""
    import torch

    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": os.environ.get("GIT_COMMIT") or git.stdout.strip() or "unknown",
    }


def main(argv: list[str]) -> int:
    if not argv:
        print(__doc__)
        return 2
    output, *pytest_arguments = argv
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *pytest_arguments]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite")
    outcomes, skipped = collections.Counter(), collections.Counter()
    for case in suite.iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = kinds[0] if kinds else "passed"
        outcomes[f"{case.get('classname').rpartition('.')[2]}: {outcome}"] += 1
        if outcome == "skipped":
            skipped[case.find("skipped").get("message")] += 1
    result = describe_machine() | {
        "command": "pytest " + " ".join(pytest_arguments),
        "exit_status": status,
        "seconds": round(float(suite.get("time"))),
        "outcomes": dict(sorted(outcomes.items())),
        "skipped_because": dict(skipped),
    }
    Path(output).write_text(json.dumps(result, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
