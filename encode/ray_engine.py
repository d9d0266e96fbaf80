"""Shards on many machines through Ray: an actor on each GPU holds the encoders, the driver deals out one shard at a time.

OUT and the photographs are folders that all machines see under the same path; an actor proves that before its first shard, and
that its encoders are those of the plan. A shard holds the same bytes whoever encodes it and is published whole, so a lost
one is simply given out again: to wherever there is room if its process died, to another node if the work itself failed.
The driver places actors node by node, so that it knows which node to name; the only file of ours that imports Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from encode import fingerprint
from encode.progress import Progress
from encode.ray_actor import TOKEN, Actor, Key, Order, Outcome, Report, key
from encode.records import InputError
from encode.shard import Context, Job, Stopped, WorkFailed
from encode.source import Item
from encode.whole_files import sweep

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError as error:
    raise InputError(
        "config.engine=ray needs Ray, which is not installed; install it with .venv/bin/pip install -r requirements-ray.txt."
    ) from error

log = logging.getLogger(__name__)
LOAD = "encode.main:load"  # MODULE:FUNCTION that an actor loads its encoders with
DEATHS = 5  # processes that a shard may cost before it is blamed
STARTS = 3  # processes that may die on a node one after the other, none of them finishing a shard
LOOK_EVERY = 2.0  # seconds between looks at the cluster's nodes, and at the actors' progress
ANSWERS_WITHIN = 10.0  # seconds
SEEN_WITHIN = 120.0  # seconds after which a shared folder has to show what another machine wrote


def encode(context: Context, plan: Mapping[str, Any], jobs: Sequence[Job], progress: Progress) -> None:
    """Encode the shards on the cluster of RAY_ADDRESS, or on a local one; returns when all of them stand in OUT.

    Raises:
      InputError: a machine does not share the folders or has other encoders, or there is no cluster.
      WorkFailed: a shard failed on two nodes, or no node is left; finished shards stay.
      Stopped: as asked.
    """
    token = context.out / TOKEN
    token.write_text(uuid.uuid4().hex)
    asked = [entry[0] for job in jobs for entry in job.entries[:1]]  # none where all were tried again elsewhere
    order = Order(
        config=context.config.to_dict(),
        folder=context.folder.absolute(),
        out=context.out.absolute(),
        token=token.read_text(),
        probe=(context.items[asked[0]].path if asked else context.folder).absolute(),
        fingerprint=plan["fingerprint"] | {"rules": fingerprint.rules()},
        cells=context.cells,
        vision_width=context.vision_width,
        load=LOAD,
    )
    try:
        with _connected() as local:
            _Driver(context, order, jobs, progress, local).run()
        _await(context, jobs)
    finally:
        token.unlink(missing_ok=True)
        sweep(context.out)


@contextlib.contextmanager
def _connected() -> Iterator[bool]:
    """Connected to a cluster; whether it is a local one of our own."""
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise InputError(
            f"RAY_ADDRESS={address}: start the command on a machine of the cluster, which shares config.out, with the "
            "address HOST:PORT (or auto) instead."
        )
    host, _, port = address.rpartition(":")
    if host:
        try:
            socket.create_connection((host, int(port)), ANSWERS_WITHIN).close()  # Ray itself would try for minutes
        except (OSError, ValueError) as error:
            words = getattr(error, "strerror", None) or error
            raise InputError(f"RAY_ADDRESS={address}: no cluster answers there ({words}).") from error
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # Ray takes SIGTERM for itself
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # What is lost is told in our words: Ray would print pages of a dead node's log, and change how ours looks.
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if not address or address == "local":
        address = "local"
        options |= {"include_dashboard": False, "object_store_memory": 128 * 2**20}
    try:
        ray.init(address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"RAY_ADDRESS={address}: no cluster can be used there ({_last(error)}); one that wants a token "
            "needs RAY_AUTH_MODE=token here as well."
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield address == "local"
    finally:
        ray.shutdown()


@dataclass(eq=False)
class _Hand:
    """An actor as the driver knows it."""

    node: str  # Ray's id of the node
    name: str
    actor: Any
    call: Any  # the answer to `start` or `encode` that is awaited; None while idle
    job: Job | None = None
    starting: bool = True
    asked: Any = None  # the answer to `report` that is awaited
    told: Report = Report()  # noqa: RUF009


class _Driver:
    def __init__(self, context: Context, order: Order, jobs: Sequence[Job], progress: Progress, local: bool):
        self.context, self.progress, self.local = context, progress, local
        self.queue, self.hands = deque(jobs), []
        self.left = len(jobs)
        self.failed: dict[Key, tuple[str, str]] = {}  # the node where a shard failed, and the sentence
        self.deaths: Counter[Any] = Counter()  # processes that died: by shard, and by node since it last finished one
        self.closed: Counter[str] = Counter()  # places of a node that get no work any more
        self.waited, self.refused, self.said = 0.0, 0, time.monotonic()
        nodes = self._nodes()
        self.first = set(nodes)
        gpus = context.config.ray.gpus
        self.gpus = gpus if gpus >= 0 else float(any(node["Resources"].get("GPU", 0) >= 1 for node in nodes.values()))
        self.order = ray.put(dataclasses.replace(order, gpus=self.gpus))

    def run(self) -> None:
        looked = 0.0
        try:
            while self.left:
                if self.context.stop():
                    raise Stopped
                if time.monotonic() - looked >= LOOK_EVERY:
                    looked = time.monotonic()
                    self._fill()
                    self._listen()
                self._deal()
                awaited = {hand.call: hand for hand in self.hands if hand.call is not None}
                if not awaited:
                    time.sleep(0.2)
                    continue
                for call in ray.wait(list(awaited), timeout=0.5)[0]:
                    self._hear(awaited[call])
        finally:
            for hand in self.hands:
                ray.kill(hand.actor)  # a shard that is in hand is dropped; nothing of it is published

    def _nodes(self) -> dict[str, dict]:
        return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}

    def _places(self) -> dict[str, tuple[str, int, int]]:
        """{node: its name, how many actors fit on it, CPUs of each}."""
        places, config = {}, self.context.config.ray
        for name, node in self._nodes().items():
            has = node["Resources"]
            cores = int(has.get("CPU", 0))
            room = int(has.get("GPU", 0) / self.gpus) if self.gpus else cores // (config.cpus or max(1, cores))
            cpus = config.cpus or max(1, cores // max(1, room))
            room = min(room, cores // cpus) - self.closed[name]
            if room > 0:
                places[name] = node["NodeManagerHostname"], room, cpus
        return places

    def _fill(self) -> None:
        """An actor for every free place, as long as there are shards for it; nodes may have come or gone."""
        places, most = self._places(), self.context.config.ray.actors or self.left
        taken = Counter(hand.node for hand in self.hands)
        turns = sorted((turn, node) for node, (_, room, _) in places.items() for turn in range(room))
        for turn, node in turns:
            if turn >= taken[node] and len(self.hands) < min(most, self.left):
                name, _, cpus = places[node]
                where = NodeAffinitySchedulingStrategy(node, soft=False)
                options = {"num_cpus": cpus, "num_gpus": self.gpus, "max_concurrency": 2, "scheduling_strategy": where}
                actor = ray.remote(Actor).options(**options).remote(self.order, cpus)
                self.hands.append(_Hand(node, name, actor, actor.start.remote()))
        for job in self.queue:
            where, words = self.failed.get(key(job), ("", ""))
            if words and not places.keys() - {where}:
                raise WorkFailed(words)
        wanted = f"{self.gpus:g} GPUs and {self.context.config.ray.cpus or 'all'} CPUs of a node"
        if not places and not self.hands and (self.local or self.closed):
            raise WorkFailed(f"no node of the cluster is left for the work (an actor takes {wanted}).")
        if time.monotonic() - self.said > 60 and all(hand.starting for hand in self.hands):
            self.said = time.monotonic()
            log.warning(
                "Waiting for %d actors to start; each takes %s, and loads the encoders.", len(self.hands), wanted
            )

    def _deal(self) -> None:
        """A shard for every idle actor, but for those on the node where it failed."""
        for hand in self.hands:
            if hand.call is not None:
                continue
            job = next((job for job in self.queue if self.failed.get(key(job), ("",))[0] != hand.node), None)
            if job is not None:
                self.queue.remove(job)
                items = {entry[0]: _absolute(self.context.items[entry[0]]) for entry in job.entries}
                hand.job, hand.call, hand.asked, hand.told = job, hand.actor.encode.remote(job, items), None, Report()

    def _hear(self, hand: _Hand) -> None:
        """What has become of a call that ended."""
        starting, job, call = hand.starting, hand.job, hand.call
        hand.starting, hand.job, hand.call = False, None, None
        try:
            outcome = ray.get(call)
        except RayTaskError as error:
            outcome = Outcome("work", f"node {hand.name}: {_last(error)}")
        except RayError as error:
            return self._died(hand, job, _last(error) if starting else "")
        if outcome.kind == "disk":
            raise WorkFailed(outcome.words)
        if outcome.kind == "input" and hand.node in self.first:
            raise InputError(outcome.words)
        if outcome.kind != "done":
            return self._put_aside(hand, job, outcome.words)
        if job is not None:
            self.left -= 1
            self.deaths[hand.node] = 0
            self.refused += outcome.refused
            self._step(hand, Report(key(job), len(job.entries), hand.told.waited))
            hand.told = Report()
        return None

    def _put_aside(self, hand: _Hand, job: Job | None, words: str) -> None:
        """An actor failed without dying: it gets no more work, and its shard one more try, on another node."""
        self._drop(hand, job)
        self.closed[hand.node] += 1
        if job is None:
            log.warning("%s This node is left out.", words)
            return
        if key(job) in self.failed:
            raise WorkFailed(f"{words} It had failed before: {self.failed[key(job)][1]}")
        self.failed[key(job)] = hand.node, words
        if self._places().keys() - {hand.node}:
            log.warning("%s The shard is tried once more, on another node.", words)
        else:
            raise WorkFailed(words)

    def _died(self, hand: _Hand, job: Job | None, why: str) -> None:
        """An actor's process is gone, or its node: nothing is known against the shard yet."""
        with contextlib.suppress(RayError):
            ray.kill(hand.actor)  # where the network alone failed
        self._drop(hand, job)
        self.deaths[hand.node] += 1
        if self.deaths[hand.node] >= STARTS:
            self.closed[hand.node] += 1
        log.warning(
            "node %s: %s was lost%s.",
            hand.name,
            "an actor that was starting" if job is None else "an actor with its shard, which is given out again,",
            f" ({why})" if why else "",
        )
        if job is not None:
            self.deaths[key(job)] += 1
            if self.deaths[key(job)] >= DEATHS:
                bucket = self.context.bucket(job.shape, max(self.context.config.resolutions))
                raise WorkFailed(
                    f"bucket {bucket}, shard {job.number}: {DEATHS} processes have died of it one after the other, the last "
                    f"one on node {hand.name}; is its memory enough? Finished shards are safe."
                )

    def _drop(self, hand: _Hand, job: Job | None) -> None:
        self.hands.remove(hand)
        if job is not None:
            self.queue.appendleft(job)
            self._step(hand, Report(key(job), 0, hand.told.waited))
        with contextlib.suppress(RayError):
            ray.kill(hand.actor)

    def _listen(self) -> None:
        """Ask every actor that works how far it is; answers are taken when they are there."""
        for hand in self.hands:
            if hand.job is None:
                continue
            if hand.asked is not None and ray.wait([hand.asked], timeout=0)[0]:
                with contextlib.suppress(RayError):  # a death is heard of from the shard
                    report = ray.get(hand.asked)
                    for words in report.warnings:
                        log.warning("%s", words)
                    if report.shard == key(hand.job):
                        self._step(hand, report)
                hand.asked = None
            if hand.asked is None:
                hand.asked = hand.actor.report.remote()

    def _step(self, hand: _Hand, report: Report) -> None:
        """Take an actor's progress into that of all: pictures in sum, the time waited as the mean over actors."""
        gained, waited = report.count - hand.told.count, report.waited - hand.told.waited
        hand.told = report
        self.waited += max(0.0, waited) / max(1, sum(other.job is not None for other in self.hands))
        if gained:
            self.progress.step(gained, self.waited, self.refused + sum(other.told.refused for other in self.hands))


def _await(context: Context, jobs: Sequence[Job]) -> None:
    """Until what other machines wrote is seen here as well: a network file system may remember that it was not there."""
    until = time.monotonic() + SEEN_WITHIN
    for job in jobs:
        while not context.part(job).exists() or context.missing(job):
            if time.monotonic() > until:
                raise WorkFailed(
                    f"{context.part(job)}: another machine has written this shard, but it is not seen here after "
                    f"{SEEN_WITHIN:.0f} s; is config.out one folder for all machines?"
                )
            time.sleep(0.5)
            for folder in (context.part(job).parent, *map(context.root, context.config.resolutions)):
                with contextlib.suppress(OSError):
                    os.listdir(folder)  # makes NFS look again


def _absolute(item: Item) -> Item:
    paths = {name: getattr(item, name) for name in ("path", "vision", "vision_flip")}
    return dataclasses.replace(item, **{name: path and path.absolute() for name, path in paths.items()})


def _last(error: BaseException) -> str:
    """The line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
