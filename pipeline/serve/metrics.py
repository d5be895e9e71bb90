"""What the server counts and times, as Prometheus reads it at /metrics.

Names are vLLM's, with moleforge_ before them, where it has such a thing. Each application has a
registry of its own, so that two of them in a process do not add up. Nothing of a request is in a
label but its address, where it is one that is served.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from .generation import Generating, Generation

# Seconds: from what a GPU takes for a token to what a person waits for a long text.
_TOKEN_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
OTHER = "other"  # of an address that is not served: what strangers try is not counted one by one


class Metrics:
    """The figures of one application; the watcher of its engine."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._responses = Counter(
            "moleforge_http_responses",
            "Answers by address and status",
            ["path", "status"],
            registry=self.registry,
        )
        self._seconds = self._histogram(
            "http_request_seconds", "From a request's headers to its answer's end", _REQUEST_S
        )
        self._first = self._histogram(
            "time_to_first_token_seconds", "From a request to its first token", _FIRST_S
        )
        self._between = self._histogram(
            "inter_token_latency_seconds", "From a token to the next one of its text", _TOKEN_S
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "From a request to the end of its text", _REQUEST_S
        )
        self._queued = self._histogram(
            "request_queue_time_seconds", "From a request to its place in the batch", _FIRST_S
        )
        self._rows = self._histogram("batch_size", "Texts that a step gave a token each", _ROWS)
        self._step = self._histogram("step_seconds", "What a step took", _TOKEN_S)
        self._confidence = self._histogram(
            "router_confidence",
            "Of each text: the router's probability of the expert it chose, or the mean over "
            "tokens and layers of the largest weight",
            _CONFIDENCE,
        )
        self._ended = Counter(
            "moleforge_requests_ended",
            "Texts by why they ended",
            ["finished_reason"],
            registry=self.registry,
        )
        ProcessCollector(namespace="", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"moleforge_{name}", text, buckets=buckets, registry=self.registry)

    def follow(self, engine: Generating) -> None:
        """Tell of an engine from here on."""
        engine.watcher = self
        self.registry.register(_EngineCollector(engine))

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._responses.labels(path, str(status)).inc()
        self._seconds.observe(seconds)

    def stepped(self, rows: int, seconds: float) -> None:
        """Count a step of the engine's."""
        self._rows.observe(rows)
        self._step.observe(seconds)

    def began(self, generation: Generation, seconds: float) -> None:
        """Count a first token."""
        self._first.observe(seconds)
        self._queued.observe(generation.times.between("asked", "begun"))

    def went_on(self, seconds: float) -> None:
        """Count a token that is not the first."""
        self._between.observe(seconds)

    def ended(self, generation: Generation, finish: str) -> None:
        """Count a text that ended."""
        self._ended.labels(finish).inc()
        if finish not in ("stop", "length"):
            return
        self._whole.observe(generation.times.between("asked", "ended"))
        confidence = _confidence_of(generation)
        if confidence is not None:
            self._confidence.observe(confidence)

    def shown(self, accept: str) -> tuple[bytes, str]:
        """Return all figures in a form that who asks accepts, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _EngineCollector(Collector):
    """What an engine counts itself, read when it is asked for."""

    def __init__(self, engine: Generating):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's counters."""
        stats = self.engine.stats
        yield GaugeMetricFamily(
            "moleforge_num_requests_running", "Texts in the batch", value=stats.running
        )
        yield GaugeMetricFamily(
            "moleforge_num_requests_waiting", "Texts that wait for a place", value=stats.waiting
        )
        yield GaugeMetricFamily("moleforge_batch_rows", "Places of the batch", value=stats.rows)
        yield CounterMetricFamily(
            "moleforge_prompt_tokens", "Tokens that were read", value=stats.prompt_tokens
        )
        yield CounterMetricFamily(
            "moleforge_generation_tokens", "Tokens that were drawn", value=stats.completion_tokens
        )
        yield CounterMetricFamily(
            "moleforge_requests_refused", "Texts that found no room to wait", value=stats.refused
        )
        spoken = CounterMetricFamily(
            "moleforge_expert_assignments",
            "Assignments of tokens to experts, over layers",
            labels=["expert"],
        )
        # copied in one go: the engine's thread goes on counting
        for name, count in dict(stats.spoken).items():
            spoken.add_metric([name], count)
        yield spoken


def _confidence_of(generation: Generation) -> float | None:
    """Return how sure the router was of a text that has ended; None where none was asked."""
    if generation.choice is not None:
        return generation.choice.confidence
    # somebody was asked for by name
    if generation.prompt.reader is not None:
        return None
    largest = []
    # not `wait`, which raises where its client has left in the very moment in which it ended
    for token in generation.tokens:
        largest += [max(weights) for weights in token.weights if weights]
    return sum(largest) / len(largest) if largest else None


def path_label(scope: Scope, known: Callable[[], frozenset[str]]) -> str:
    """Return how a request's address is counted: as it is served, parameters unnamed."""
    route = scope.get("route")
    template = getattr(route, "path", None)
    if isinstance(template, str):
        return template
    # refused before it came to its route
    return scope["path"] if scope["path"] in known() else OTHER
