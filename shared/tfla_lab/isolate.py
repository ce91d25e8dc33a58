"""A worker: a process of its own that answers questions, so that whatever ends it is an answer too.

    worker = Worker("tfla_lab.bench:answer")
    worker.ask({"kernel": "mlstm_tfla", ...}, seconds=60)

A question is a dictionary, and so is its answer. What goes wrong is the answer {"problem": why}: an exception, an
abort, a fault, too much time. The next question gets a new process where the old one is gone.
"""

import contextlib
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile

MOST_CHARACTERS = 240  # of a reason


class Worker:
    """Answers with the function that `answer` names, "module:function", in a process that it starts when needed.

    Args:
        answer: the function, dict -> dict, both as JSON knows them.
        first: a question that each new process is asked to begin with, for what it loads; nobody reads the answer.
        environment: variables that are set there on top of those that are set here.
    """

    def __init__(self, answer: str, first: dict | None = None, environment: dict[str, str] | None = None):
        self.arguments = [answer] + ([json.dumps(first)] if first else [])
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})}
        self.process = self.errors = None

    def start(self) -> None:
        """Starts the process, if it is not there: what it loads can be loaded while others are asked."""
        if self.process is None:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tfla_lab.isolate", *self.arguments], env=self.environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            )  # fmt: skip

    def ask(self, question: dict, *, seconds: float) -> dict:
        """The answer, or {"problem": why there is none} after at most `seconds`."""
        self.start()
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, and that is dealt with below
            print(json.dumps(question), file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.stop()
            return {"problem": f"crashes: no answer after {seconds:g} s"}
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            why = self._last_words()
            self.stop()
            return {"problem": f"crashes: {how}" + (f": {why}" if why else "")}
        answer = json.loads(line)
        if answer.pop("spent", False):
            self.stop()
        return answer

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout, self.errors):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
            self.process = self.errors = None

    def _last_words(self) -> str:
        """The last line on stderr that speaks of an error; else the last line."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"error|assert|fault|illegal|abort|trying to", line, re.I)]
        return (telling or lines or [""])[-1][:MOST_CHARACTERS]


def reason(error: BaseException) -> str:
    """An exception in a line."""
    words = " ".join(str(error).split())[:MOST_CHARACTERS]
    if isinstance(error, ImportError):
        return f"cannot be imported: {words}"
    if "out of memory" in words:
        return f"out of memory: {words}"
    return f"refuses: {type(error).__name__}" + (f": {words}" if words else "")


def main(argv: list[str]) -> int:
    module, name = argv[0].split(":")
    # What others print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    function = getattr(importlib.import_module(module), name)
    if argv[1:]:
        with contextlib.suppress(Exception):  # which will come again with the first question that is read
            function(json.loads(argv[1]))
    for line in sys.stdin:
        try:
            answer = function(json.loads(line))
        except Exception as error:
            # After a fault on the GPU, or without its memory, this process is of no use any more.
            answer = {"problem": reason(error), "spent": "CUDA" in str(error)}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
