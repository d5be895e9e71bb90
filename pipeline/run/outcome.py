"""What a finished job left, in a line for people."""

from .dry_run import figures


def outcome(metrics: dict) -> str:
    """Return what came of a job, from its metrics."""
    # What tells a bundle, a tokenizer and a preprocess of documents by their metrics: a new stage
    # needs no line here
    if {"files", "experts", "parameters"} <= metrics.keys():
        text = (
            f"{metrics['experts']} experts, {metrics['parameters']:,} parameters, "
            f"{metrics['files']} files"
        )
        if "dense_bytes" in metrics:
            text += f"; dense {metrics['dense']} is {metrics['dense_bytes'] / 1e6:.1f} MB of it"
        return text
    return _text_outcome(metrics) if "vocab_size" in metrics else figures(metrics)


def _text_outcome(metrics: dict) -> str:
    text = f"vocabulary {metrics['vocab_size']:,}"
    if "tokens" in metrics:
        domains = ", ".join(f"{d} {n:,}" for d, n in metrics["tokens"]["train"].items())
        text = f"training tokens: {domains}"
    elif "documents" in metrics:
        domains = ", ".join(f"{d} {n:,}" for d, n in metrics["documents"].items())
        text += f"; documents: {domains}"
    if "tokenizer" in metrics:
        tried = metrics["tokenizer"]
        text += f"; the tokenizer puts {tried['front']} in front"
        if tried["lost_share"]:
            text += f", loses {tried['lost_share']:.2%} of the bytes"
        if tried["unknown_share"]:
            text += f", has no entry for {tried['unknown_share']:.2%} of the tokens"
    return "\n".join([text, *metrics.get("notes", ())])
