"""The memory checker of the CUDA toolkit over a few cases, in a process of its own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

PROGRAM = "compute-sanitizer"
TOOLS = ("memcheck", "synccheck")
FORMS = ("ci_hd128", "ci_prefill", "ci_append_packed", "ci_fused")
FOUND = 86  # the exit status of a program with errors


def run(script: str, tools: Sequence[str], seconds: float) -> dict[str, Any]:
    """What each tool says, by its name; a tool that takes longer than its share is cut off."""
    if (program := shutil.which(PROGRAM)) is None:
        return {"problem": f"{PROGRAM} is not installed"}
    return {tool: _run(program, script, tool, seconds / len(tools)) for tool in tools}


def _run(program: str, script: str, tool: str, seconds: float) -> dict[str, Any]:
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, script]
    command += ["--part", "fuzz", "--seeds", "1", "--jobs", "0", "--forms", *FORMS]
    # one allocation for each array, or writes past one would land in the next unseen
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"not done within {seconds:.0f} s"}
    return read(done.returncode, done.stdout + done.stderr)


def read(status: int, output: str) -> dict[str, Any]:
    """The number of errors, with the end of what was said if there are any."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", output)
    if summary is None:
        return {"problem": f"ended with {status}: {output.strip()[-400:]}"}
    errors = int(summary[1])
    if errors or status:
        return {"errors": errors, "problem": output.strip()[-2000:]}
    return {"errors": 0}
