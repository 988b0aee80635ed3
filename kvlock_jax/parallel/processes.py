"""Joins the processes of several hosts."""

import jax

from kvlock_jax.errors import ConfigError


def join_hosts(
    distributed: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other hosts, if there are any; to be called before anything else uses JAX.

    Args:
      distributed: whether there are several hosts that JAX finds by itself, as on Cloud TPU.
      coordinator: `HOST:PORT` of the first host, where nothing else knows it; with it come
        `num_processes`, how many hosts there are, and `process_id`, which one this is, from 0.

    Raises:
      ConfigError: some of these are missing, or the other hosts cannot be reached.
    """
    named = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    absent = [f"--{name}" for name, value in named.items() if value is None]
    if len(absent) == len(named) and not distributed:
        return
    if absent and len(absent) < len(named):
        raise ConfigError(f"{', '.join(absent)} must be given too: --coordinator takes all three")
    if not absent and not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id must be from 0 to {num_processes - 1}, found {process_id}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the hosts cannot meet: {reason}") from error
