"""What is paid for while no job runs: containers that serve, and what lies on the volume."""

from collections.abc import Iterator

from ..config.machines import MachineConfig, ModalConfig
from .endpoint import placed
from .estimate import conducting_usd_per_s
from .prices import Prices

HOUR_S = 3_600
MONTH_H = 30 * 24


def endpoint_usd_per_hour(modal: ModalConfig, prices: Prices) -> float:
    """Return what one container of the endpoint costs an hour, at work or idle."""
    machine = placed(modal)
    return HOUR_S * prices.usd_per_s(machine, machine.regions)


def endpoint_told(modal: ModalConfig, prices: Prices) -> str:
    """Return what an endpoint of these settings costs, in words."""
    machine = modal.endpoint
    each = endpoint_usd_per_hour(modal, prices)
    idle = each * machine.idle_s / HOUR_S
    least, most = machine.min_containers, machine.max_containers
    always = "nothing without requests"
    if least:
        always = f"${least * each:.2f} an hour without requests (${least * each * MONTH_H:,.2f} in "
        always += f"30 days), as modal.endpoint.min_containers is {least}"
    spare = machine.buffer_containers
    beside = f", {spare} of them ready beside those at work" if spare else ""
    return (
        f"endpoint: ${each:.2f} an hour for each container while it is up, which is "
        f"{machine.idle_s} s beyond its last request (${idle:.2f}); {always}, at most "
        f"${most * each:.2f} an hour for {most} at once{beside} ({prices.told([placed(modal)])})"
    )


def deployment_told(modal: ModalConfig, prices: Prices, cuda: str) -> Iterator[str]:
    """Yield what a person should know of a deployment before it is made: its costs, and GPUs that
    want another CUDA than the locked torch brings, which is `cuda`."""
    yield endpoint_told(modal, prices)
    machines: dict[str, MachineConfig] = {"modal.endpoint.gpu": modal.endpoint}
    if modal.reevaluate:
        machines["modal.evaluate.gpu"] = modal.evaluate
    yield from prices.cuda_notes(machines, cuda)


def endpoint_cost_problems(modal: ModalConfig, prices: Prices) -> Iterator[str]:
    """Yield that all containers of the endpoint may cost more than modal.max_endpoint_usd_per_hour,
    where they may."""
    limit = modal.max_endpoint_usd_per_hour
    most = modal.endpoint.max_containers
    usd = most * endpoint_usd_per_hour(modal, prices)
    if limit is not None and usd > limit:
        yield (
            f"modal.endpoint: {most} containers at once cost ${usd:.2f} an hour, above "
            f"modal.max_endpoint_usd_per_hour {limit:.2f} (prices of {prices.checked}): choose a "
            "cheaper machine or fewer of them (modal.endpoint.max_containers), or raise the limit"
        )


def tending_told(seconds: float, modal: ModalConfig, prices: Prices) -> str:
    """Return what the container that has looked at the volume cost, in words."""
    usd = seconds * conducting_usd_per_s(prices, modal.regions)
    return f"the container that did this cost ${usd:.4f} in {seconds:,.0f} s ({prices.told()})"


def storage_told(stored_bytes: int, prices: Prices) -> str:
    """Return what so much on the volume costs, in words."""
    storage = prices.storage
    usd = prices.usd_per_month(stored_bytes)
    return (
        f"{stored_bytes / 1e9:,.2f} GB, at most ${usd:.2f} a month, as the first "
        f"{storage.free_gib:,.0f} GiB of a workspace are free (prices of {storage.checked})"
    )
