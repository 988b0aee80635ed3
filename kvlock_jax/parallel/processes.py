"""Joins the processes of several hosts."""

import jax

from kvlock_jax.errors import ConfigError

_HEARTBEAT = 50  # seconds after which a host that was killed ends the others; JAX waits 100


def join_hosts(
    distributed: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other hosts, if any; call it before anything else uses JAX.

    Args:
      distributed: whether JAX finds the other hosts by itself, as on Cloud TPU.
      coordinator: `HOST:PORT` of the first host, where JAX cannot find it.
      num_processes: count of the hosts, with `coordinator`.
      process_id: number of this host, from 0, with `coordinator`.

    Raises:
      ConfigError: some of these are missing, or the other hosts cannot be reached.
    """
    flags = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    absent = [f"--{name}" for name, value in flags.items() if value is None]
    if len(absent) == len(flags) and not distributed:
        return
    if absent and len(absent) < len(flags):
        raise ConfigError(f"{', '.join(absent)} must be given too: --coordinator takes all three")
    if not absent and not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id must be from 0 to {num_processes - 1}, found {process_id}")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the hosts cannot meet: {reason}") from error
