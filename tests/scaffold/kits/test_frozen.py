"""The plugin that was frozen with version 1 of the plugin API passes every check with the present core, by its own tests.

Without the sizes of heads that the kit adds: these are about kernels, which no plugin sees.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import frozen
import pytest


@pytest.mark.parametrize(
    ("tests", "least"),
    [("test_gemma2", 80), ("test_opt", 80), ("test_bert or plain or own or gated", 50)],
)
def test_the_frozen_plugin_passes_its_own_tests(tests, least, tmp_path):
    frozen.write_metadata(tmp_path)
    path = os.pathsep.join([str(frozen.SOURCES), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    # Alone: packages of this repository declare the same model types.
    alone = {
        "LORAX_PLUGINS": "lorax-frozen",
        "PYTHONPATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # As in a folder of its own: without the settings and the fixtures of this repository.
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(frozen.PLUGIN),
        "--noconftest",
        "-k",
        f"({tests}) and not heads_of",
    ]

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(frozen.PLUGIN / "tests")],
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least
