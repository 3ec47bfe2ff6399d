"""The record of decisions, thinned out so that neither memory nor checkpoints grow with the length of a run."""

from __future__ import annotations

from ela_kernels.ebqm.report import DecisionRecord

MOST = 512
"""Records kept, at most."""


def thinned(records: list[DecisionRecord]) -> list[DecisionRecord]:
    """`records`, or about half of them where there are more than :data:`MOST`; the last always, and the first.

    Of equal spans of steps, each twice as long as before once there are too many, the first record stays. So the record
    becomes coarser with the length of a run, and evenly: what stays is what would of the whole. Those in which a layer
    was dropped or came back stay too, as long as they are few. By the numbers alone: every process keeps the same.
    """
    if len(records) <= MOST:
        return records
    last, span = len(records) - 1, 1
    while records[last].step // span - records[0].step // span > MOST // 2:
        span *= 2
    changes = [i for i in range(1, last) if records[i].skipped != records[i - 1].skipped]
    kept = {0, last, *(changes if len(changes) <= MOST // 4 else ())}
    kept.update(i for i in range(1, last) if records[i].step // span != records[i - 1].step // span)
    return [records[i] for i in sorted(kept)]
