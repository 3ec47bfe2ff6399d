"""The record of decisions, thinned out so that neither memory nor checkpoints grow with the length of a run."""

from __future__ import annotations

from ela_kernels.ebqm.report import DecisionRecord

MOST = 512
"""Records kept, at most."""


def thinned(records: list[DecisionRecord]) -> list[DecisionRecord]:
    """`records`, or about half of them where there are more than :data:`MOST`; the last always, and the first.

    Those in which a layer was dropped or came back stay as long as they are not most of all. So the record becomes
    coarser with the length of a run, evenly and by the numbers alone: every process keeps the same.
    """
    if len(records) <= MOST:
        return records
    last = len(records) - 1
    kept, drops = [], False
    for i, record in enumerate(records):
        if i not in (0, last) and record.skipped == records[i - 1].skipped:
            drops = not drops
            if drops:
                continue
        kept.append(record)
    if len(kept) > 3 * MOST // 4:
        kept = [*records[:-1:2], records[-1]]
    return kept
