"""Which replica answers a request: the same one for the same adapter, as long as it has room (Ray Serve's router).

    score(adapter, replica) = sha256(adapter, replica)        rank replicas by it, highest first (rendezvous hashing)

An adapter then lives in one replica's memory and not in all, replicas that come or go move only their own share, and no
table has to be agreed on. A replica that is full is passed over for the next in rank. Serve's own multiplexing keeps a
list of what each replica has loaded, counts models and not bytes, and unloads what requests still use.
"""

import random
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class RendezvousRouter(RequestRouter):
    """Ranks replicas by the request's model id; requests for the base go to one of two drawn at random."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each, the adapter's home first."""
        adapter = "" if pending_request is None else pending_request.metadata.multiplexed_model_id
        if not adapter:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[named[name]] for name in ranked(adapter, list(named))]


def ranked(adapter: str, replicas: Sequence[str]) -> list[str]:
    """Names of replicas, the one that ``adapter`` belongs to first."""

    def score(replica: str) -> Any:
        return sha256(f"{adapter}\0{replica}".encode()).digest(), replica

    return sorted(replicas, key=score, reverse=True)
