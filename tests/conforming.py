"""Prove methods: `python tests/conforming.py NAME...` prints, as JSON, what holds for each.

What trains gets the conformance suite. Anything else runs once with its small settings. The two
processes that one property needs are started once for all methods.
"""

import json
import sys
import tempfile
from pathlib import Path

from polm_lab.core.method import find
from polm_lab.training import conformance as check


def prove(names: list[str], out: Path) -> dict[str, dict[str, bool]]:
    "Return, for each method, whether each property holds; the runs go to the folder `out`."
    found, trained = {}, {}
    for name in names:
        method = find(name)
        run = check.short_run(method, out / name)
        if not method.trains:
            found[name] = {when: bool(run.summary.get(when)) for when in ("before", "after")}
            found[name]["finished"] = run.status == "finished"
            continue
        found[name], trained[name] = {}, run
        for prop in check.PROPERTIES:
            if prop is not check.two_processes_are_one:
                place = out / name / prop.__name__
                found[name][prop.__name__] = bool(prop(method, place, run)[1])
    if trained:
        pairs = check.in_two_processes(list(trained.values()), out)
        for (name, run), pair in zip(trained.items(), pairs):
            gap = check.distance(pair, run)
            found[name][check.two_processes_are_one.__name__] = gap < check.CLOSE
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(prove(sys.argv[1:], Path(place))))
