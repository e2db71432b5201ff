"""Replicas on several kinds of device (a GPU and a CPU, two kinds of GPU) are kept together.

Each kind rounds an update in its own way and adds up a norm in its own order, so replicas drift apart by rounding. Within a kind
they are equal to the bit and compared as ever: who differs from its like is named, or mended. Then all get the state of the kind
that most workers are (of equals: the first), and `Aligned` says how far the others had drifted. Who is not finite where others are
has no vote, and is mended from another kind where its own has none. Workers that walk by themselves
between agreements keep the way that they have gone since the last one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from manyhands.core.errors import Diverged
from manyhands.core.events import Aligned, Emit
from manyhands.core.request import Gather
from manyhands.train.mending import Vote, refuse, replace, same_parameters, tell, vote

if TYPE_CHECKING:
    from manyhands.train.mending import Shared
    from manyhands.train.replica import Replica

MOST_DRIFT = 0.01  # of parameters between two comparisons; rounding gives 1e-6


def align(
    replica: Replica,
    shared: Shared,
    table: Sequence[Sequence[int]],
    kinds: Sequence[int],
    finite: Sequence[bool],
    *,
    mend: bool,
    who: Sequence[tuple[str, str]],
    emit: Emit,
) -> str:
    """Give everybody the state of the reference kind; its parameters' fingerprint in words. Collective.

    Args:
        table: everybody's fingerprints. kinds: everybody's kind of device. finite: of `finite_of`. The others: as of
            `check_agreement`.

    Raises:
        Diverged: one differs from its like and is not to be mended, or a kind has drifted further than rounding can.
    """
    likes = {kind: [r for r, other in enumerate(kinds) if other == kind] for kind in kinds}
    verdicts = {kind: among(table, ranks, finite) for kind, ranks in likes.items()}
    voting = Counter(kind for kind, good in zip(kinds, finite, strict=True) if good)
    for kind in voting:
        if verdicts[kind].minority:
            refuse(replica.steps, table, likes[kind], verdicts[kind], finite, mend, who)
    source = verdicts[voting.most_common(1)[0][0]].majority[0]
    for kind in likes:
        if kind not in voting:
            verdict = Vote((source,), tuple(likes[kind]))
            refuse(replica.steps, table, likes[kind], verdict, finite, mend, who)
    wrong = sorted(rank for verdict in verdicts.values() for rank in verdict.minority)
    late = tuple(r for r in range(len(table)) if table[r] != table[source])
    if late:
        begun = time.perf_counter()
        size, mine = replace(replica, shared, table, Vote((source,), late), wrong)
        told = replica.wire.begin(Gather(torch.tensor([mine], dtype=torch.float64), even=True)).wait()
        drifts = {rank: float(told[rank]) for rank in late if rank not in wrong}
        tell(replica.steps, table, source, wrong, who, size, begun, emit)
        if drifts:
            drift, wall_s = max(drifts.values()), time.perf_counter() - begun
            emit(
                Aligned(step=replica.steps, ranks=tuple(drifts), drift=drift, size_bytes=size, wall_s=wall_s)
            )
            if not drift <= MOST_DRIFT:
                raise Diverged(
                    f"after step {replica.steps} the parameters of worker {max(drifts, key=lambda r: drifts[r])} are a "
                    f"relative {drift:.1e} from worker {source}'s",
                    f"other kinds of device drift by rounding, less than {MOST_DRIFT} between two comparisons",
                    "one of them computes wrongly, or training is unstable: --resume from the last checkpoint",
                )
    return same_parameters(replica, who)


def among(table: Sequence[Sequence[int]], ranks: Sequence[int], finite: Sequence[bool]) -> Vote:
    """Who is right of these ranks; nobody, where none of them is `finite`. Pure.

    >>> among([(1,), (2,), (1,), (3,)], [0, 2, 3], [True] * 4)
    Vote(majority=(0, 2), minority=(3,))
    >>> among([(1,), (2,), (1,), (3,)], [1, 3], [True, False, True, False])
    Vote(majority=(), minority=(1, 3))
    """
    if not any(finite[r] for r in ranks):
        return Vote((), tuple(ranks))
    majority, minority = vote([table[r] for r in ranks], [finite[r] for r in ranks])
    return Vote(tuple(ranks[i] for i in majority), tuple(ranks[i] for i in minority))
