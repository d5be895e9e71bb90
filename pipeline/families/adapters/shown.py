"""Requests as the report shows them: a few, their texts cut, their pictures small and bounded all
together.

N requests, C choices.
"""

from collections.abc import Mapping, Sequence

from ...report.schema.requests import AnsweredRequest, GivenAnswer, MisroutedRequest
from .eval_data import AdapterEvaluator, EvalRequest, Judged
from .inference import BASE
from .routing_eval import NEUTRAL, Routed
from .stack import Answer

CHARACTERS = 600  # of a prompt or an answer
THUMBNAILS_BYTES = 2_000_000  # of all, as they stand in the report


class Gallery:
    """Makes what the report shows of requests; pictures come in until there are enough of them."""

    def __init__(self, evaluator: AdapterEvaluator):
        self.evaluator = evaluator
        self.most: int = evaluator.cfg.evaluate.samples
        self.left = THUMBNAILS_BYTES

    def misrouted(self, sets: Mapping[str, Routed]) -> tuple[MisroutedRequest, ...]:
        """Return of each split requests that the router sent elsewhere, those first that it was
        most sure of."""
        out = []
        for name, routed in sets.items():
            # The neutral prompts of a split are among its requests
            if not name.endswith(NEUTRAL):
                out += [self._misrouted(routed, i) for i in _surest_mistakes(routed)[: self.most]]
        return tuple(out)

    def _misrouted(self, routed: Routed, i: int) -> MisroutedRequest:
        prob_C = routed.prob_NC[i]
        choice = int(prob_C.argmax())
        request = routed.requests[i]
        return MisroutedRequest(
            set=routed.name,
            own=request.expert,
            prompt=_cut(request.prompt),
            pictures=self._thumbnails(request),
            choice=self.evaluator.stack.choices[choice],
            confidence=float(prob_C[choice]),
        )

    def answered(
        self,
        split: str,
        requests: Sequence[EvalRequest],
        answers: Sequence[Answer],
        judged: Sequence[Mapping[str, Judged]],
    ) -> tuple[AnsweredRequest, ...]:
        """Return the first requests of each task, task by task, with the stack's answer, the right
        expert's and the base's."""
        shown: dict[str, int] = {}
        out = []
        for request, answer, others in zip(requests, answers, judged, strict=True):
            count = shown.get(request.expert, 0)
            if count >= self.most:
                continue
            shown[request.expert] = count + 1
            score = self.evaluator.judge(request, answer.text)["score"]
            given = [_given("stack", answer.expert, answer.text, score)]
            for way, name in (("right expert", request.expert), ("base", BASE)):
                other = others[name]
                given.append(_given(way, name, other.text, other.figures["score"]))
            out.append(
                AnsweredRequest(
                    set=split,
                    own=request.expert,
                    prompt=_cut(request.prompt),
                    pictures=self._thumbnails(request),
                    right=_cut(request.wanted[0]),
                    answers=tuple(given),
                )
            )
        experts = self.evaluator.cfg.experts
        return tuple(sorted(out, key=lambda each: experts.index(each.own)))

    def _thumbnails(self, request: EvalRequest) -> tuple[str, ...]:
        """Return small copies of what a request came with, as far as there is room."""
        out = []
        for medium in request.open():
            thumbnail = self.evaluator.media.thumbnail(medium)
            if thumbnail is None or len(thumbnail) > self.left:
                continue
            self.left -= len(thumbnail)
            out.append(thumbnail)
        return tuple(out)


def _surest_mistakes(routed: Routed) -> list[int]:
    """Return the places of requests that went to a wrong expert, the surest first."""
    hit_N = routed.hits()
    confidence_N = routed.prob_NC.max(1)
    wrong = [i for i, hit in enumerate(hit_N.tolist()) if not hit]
    # stable: of equally sure ones the first
    return sorted(wrong, key=lambda i: -float(confidence_N[i]))


def _given(way: str, by: str, text: str, score: float | None) -> GivenAnswer:
    return GivenAnswer(way=way, by=by, text=_cut(text), score=score)


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"
