"""Sessions of pages are run again, and what is no session stays."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import run_sessions

PAGE = """# Page

```console
$ echo one \\
    two
what it said before
$ echo three > here.txt; cat here.txt
```

```console
bash tools/test.sh
```

```text
$ echo no
```
"""


def test_output_takes_the_place_of_the_lines_below_a_command(tmp_path):
    found = run_sessions.refreshed(PAGE, tmp_path, dict(os.environ))
    assert found == PAGE.replace("what it said before\n", "one two\n").replace("here.txt\n```", "here.txt\nthree\n```")
