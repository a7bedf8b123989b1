"""Load the credit service: mixed lengths, a scorer that is killed, malformed and oversized bodies.

Every answer is compared with the local computation. ``python -m benchmarks.service.load_test`` writes
``benchmarks/results/service.json``. With ``--ray`` the service is ``flowgraph-rl serve`` in processes of its own.
Without it, the same service runs in this process behind an HTTP server of the standard library, and the loss of a
scorer is an error that its pool raises.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common import save
from rl.alignment.arms import parse_arm
from rl.integrations.engine_credit import EngineCredit, EngineSequence
from rl.integrations.service import CreditClient
from rl.policy.loading import load_model
from rl.serving.access import Access
from rl.serving.credit_service import CreditService, LocalScorers, ScorerLostError
from rl.serving.endpoints import Endpoints
from rl.serving.limits import ServiceLimits
from rl.serving.scorer import Scorer, ScoringJob, ScoringOutcome
from rl.tasks.registry import make_task

TOKEN = "a-token-of-the-load-test"
ARMS = ("reach_sharp:soft:floor=0.5,ceiling=2,fallback=0.5", "flow", "entropy:soft")
MAX_BODY_BYTES = 200_000
START_SECONDS = 280
TOLERANCE = 1e-5


def sequences(count: int, seed: int) -> list[EngineSequence]:
    """Make sequences of very different lengths from problems of the task and random text of its alphabet."""
    _, tokenizer = load_model("program")
    task = make_task("program")
    draw = random.Random(seed)
    found = []
    for number in range(count):
        prompt = tokenizer(str(task.sample("train", number).prompt))["input_ids"]
        text = "".join(draw.choice("ABCDEFGH=+;123") for _ in range(round(4 * 30 ** draw.random())))
        response = tokenizer(f"{text};#{draw.choice('ABC')}={draw.randint(0, 9)}")["input_ids"]
        found.append(EngineSequence(prompt, response))
    return found


def local_weights(given: Sequence[EngineSequence]) -> dict[str, list[list[float]]]:
    """Compute the weights of every sequence alone, by rule."""
    model, tokenizer = load_model("program")
    find_answer = make_task("program").find_answer
    found = {}
    for arm in ARMS:
        credit = parse_arm(arm)
        engine = EngineCredit(credit, model, tokenizer, find_answer=find_answer, micro_batch_size=1)
        found[credit.rule] = [engine.weigh([one]).weights[0].tolist() for one in given]
    return found


@contextmanager
def ray_service(folder: Path, replicas: int) -> Iterator[tuple[str, Any]]:
    """Run ``flowgraph-rl serve``; yield its URL and a function that kills a scorer."""
    (folder / "token").write_text(TOKEN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", "program", "--task", "program", "--rules", ",".join(ARMS), "--port", str(port)]
    words += ["--replicas", str(replicas), "--token-file", str(folder / "token")]
    words += ["--max-body-bytes", str(MAX_BODY_BYTES), "--max-queue", "32"]
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-m", "rl.cli", *words], stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "listening on" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(log.read_text())
            time.sleep(0.5)

        def kill() -> None:
            below = psutil.Process(process.pid).children(recursive=True)
            scorers = [
                child.pid
                for child in below
                if "ServeReplica" in " ".join(child.cmdline()) and ":scorer" in " ".join(child.cmdline())
            ]
            os.kill(scorers[0], signal.SIGKILL)

        yield f"http://127.0.0.1:{port}", kill
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


class _LosingScorers(LocalScorers):
    """A scorer in this process that can be lost in the middle of a batch, and is made anew."""

    is_lost = False

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoringOutcome]:
        outcomes = await super().score(jobs)
        if self.is_lost:
            self.is_lost = False
            self._scorer = Scorer("program", limits=ServiceLimits(), task="program")
            raise ScorerLostError("killed")
        return outcomes


@contextmanager
def local_service() -> Iterator[tuple[str, Any]]:
    """Run the service in this process; yield its URL and a function that loses its scorer."""
    from tests.fixtures.http_server import serving

    limits = ServiceLimits(max_body_bytes=MAX_BODY_BYTES, max_queue=32)
    scorer = Scorer("program", limits=limits, task="program")
    scorers = _LosingScorers(scorer)
    rules = {parse_arm(arm).rule: parse_arm(arm) for arm in ARMS}
    service = CreditService(scorer.facts, rules, limits, scorers)
    with serving(Endpoints(service, Access(Access.digest_of(TOKEN)))) as (_, url):

        def lose() -> None:
            scorers.is_lost = True

        yield url, lose


def raw_status(url: str, body: bytes) -> int:
    """Send a body as it is; return the status."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=120)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
        connection.request("POST", "/v1/credit", body=body, headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        # The server may close the connection before an oversized body is sent.
        return 413
    finally:
        connection.close()


def load(url: str, kill: Any, count: int, workers: int, given: Sequence[EngineSequence], seed: int) -> dict[str, Any]:
    """Send all requests, kill a scorer after a third of them, and collect what came back."""
    draw = random.Random(seed)
    rules = [parse_arm(arm).rule for arm in ARMS]
    plan = [(number, draw.randrange(len(given)), draw.choice(rules)) for number in range(count)]
    client = CreditClient(url, TOKEN, attempts=30)
    answers: list[dict[str, Any]] = []
    seconds: list[float] = []
    bad: Counter[str] = Counter()
    lock = threading.Lock()

    def one(entry: tuple[int, int, str]) -> None:
        number, row, rule = entry
        if number == count // 3:
            kill()
        # Every twentieth request comes with a malformed body before it, and some with an oversized one.
        if number % 20 == 0:
            status = raw_status(url, b'{"ids": [1, NaN')
            with lock:
                bad[f"malformed: {status}"] += 1
        if number % 100 == 50:
            status = raw_status(url, b'{"ids": [' + b"1, " * MAX_BODY_BYTES + b"1]}")
            with lock:
                bad[f"oversized: {status}"] += 1
        sequence = given[row]
        ids = [*sequence.prompt_ids, *sequence.response_ids]
        begun = time.perf_counter()
        answer = client.credit(
            [{"ids": ids, "prompt_length": len(sequence.prompt_ids)}], rule=rule, request_id=f"request-{number}"
        )
        with lock:
            seconds.append(time.perf_counter() - begun)
            answers.append({"number": number, "row": row, "rule": rule, "answer": answer})

    begun = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(one, plan):
            pass
    return {
        "answers": answers,
        "bad": dict(sorted(bad.items())),
        "seconds": seconds,
        "wall": time.perf_counter() - begun,
    }


def check(found: dict[str, Any], count: int, local: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Compare every answer with its request and with the local weights."""
    largest = 0.0
    wrong = 0
    num_weights = 0
    num_ones = 0
    names = Counter(entry["answer"]["request_id"] for entry in found["answers"])
    for entry in found["answers"]:
        answer = entry["answer"]
        expected = torch.tensor(local[entry["rule"]][entry["row"]])
        own = torch.tensor(answer["sequences"][0]["weights"])
        is_own = answer["request_id"] == f"request-{entry['number']}" and answer["rule"] == entry["rule"]
        if not is_own or own.shape != expected.shape:
            wrong += 1
            continue
        # In units of the weight, where that is above 1: padding changes the rounding of float32.
        difference = float(((own - expected).abs() / expected.clamp_min(1)).max())
        largest = max(largest, difference)
        num_weights += len(own)
        num_ones += int((own == 1).sum())
        wrong += difference > TOLERANCE
    return {
        "answered": len(found["answers"]),
        "lost": count - len(names),
        "doubled": sum(number > 1 for number in names.values()),
        "wrong": wrong,
        "largest_difference": largest,
        "share_of_weights_other_than_1": 1 - num_ones / max(1, num_weights),
    }


def main() -> None:
    """Run the load test and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=60)
    parser.add_argument("--ray", action="store_true")
    arguments = parser.parse_args()

    given = sequences(arguments.sequences, seed=1)
    local = local_weights(given)
    with tempfile.TemporaryDirectory() as name:
        service = ray_service(Path(name), arguments.replicas) if arguments.ray else local_service()
        with service as (url, kill):
            found = load(url, kill, arguments.requests, arguments.workers, given, seed=2)
            client = CreditClient(url, TOKEN)
            health = client.health()
            metrics = metrics_of(url)
    checked = check(found, arguments.requests, local)
    lengths = [len(one.prompt_ids) + len(one.response_ids) for one in given]
    seconds = sorted(found["seconds"])
    values = {
        "transport": "Ray Serve" if arguments.ray else "HTTP server of the standard library, one process",
        "requests": arguments.requests,
        "workers": arguments.workers,
        "replicas": arguments.replicas if arguments.ray else 1,
        "rules": list(ARMS),
        "tokens": {"least": min(lengths), "most": max(lengths)},
        "checks": checked,
        "refused": found["bad"],
        "seconds": {
            "total": found["wall"],
            "median": statistics.median(seconds),
            "percentile_99": seconds[int(0.99 * (len(seconds) - 1))],
        },
        "requests_per_second": arguments.requests / found["wall"],
        "batches": metrics["batches_total"],
        "requests_per_batch": metrics["batch_requests_total"] / max(1.0, metrics["batches_total"]),
        "scored_alone": metrics["alone_sequences_total"],
        "lost_scorers": metrics["lost_scorers_total"],
        "left_waiting": health["waiting"] + health["in_progress"],
    }
    save("service", [values], "load test of the credit service, model program; weights against EngineCredit alone")
    if checked["lost"] or checked["doubled"] or checked["wrong"]:
        raise SystemExit("a request was lost, doubled or wrong")


def metrics_of(url: str) -> dict[str, float]:
    """Read the counters without labels."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    text = connection.getresponse().read().decode()
    connection.close()
    found = {}
    for line in text.splitlines():
        if not line.startswith("#") and "{" not in line:
            name, value = line.split()
            found[name.removeprefix("flowgraph_credit_")] = float(value)
    return found


if __name__ == "__main__":
    main()
