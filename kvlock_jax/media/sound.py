"""Sound of a video: its packets, copied bit for bit, cut to the frames taken."""

import io
import struct
import warnings
from collections.abc import Iterator
from fractions import Fraction

import av

from kvlock_jax.media.footage import Sound

_KEEPERS = ("nut", "mov")
"""Containers to keep packets in, which between them hold every codec; NUT has exact times."""


def read_sound(
    name: object, container: av.container.InputContainer, start: Fraction, end: Fraction | None
) -> Sound | None:
    """The sound of some frames: every packet that begins before their end, untouched.

    Sound before the first frame is kept, and delays it (`Sound.lead`). Sound that cannot be read is
    left out, with a warning.

    Args:
      name: of the file, for the warning.
      container: the open file, at any place.
      start: seconds of the first frame, by the file's clock.
      end: seconds at which the last frame ends; None takes all sound.
    """
    streams = [s for s in container.streams.audio if s.codec_context is not None]
    if not streams:
        return None
    try:
        packets = _packets(container, streams, end)
        if not packets:
            return None
        shown = min(_time(packet) + _skipped(packet) for packet in _firsts(packets))
        first = min(_time(packet) for packet in packets)
        data = _kept(packets, streams, first)
    except (av.FFmpegError, ValueError) as error:
        warnings.warn(f"{name}: the sound is left out, it cannot be copied ({error})", stacklevel=2)
        return None
    return Sound(data, lead=max(Fraction(0), start - shown), shift=first - start)


def _packets(
    container: av.container.InputContainer,
    streams: list[av.AudioStream],
    end: Fraction | None,
) -> list[av.Packet]:
    """The packets of sound that begin before `end`."""
    container.seek(0, backward=True)
    packets, reached = [], set()
    for packet in container.demux(streams):
        if not packet.size or packet.pts is None:
            continue
        if end is not None and _time(packet) >= end:
            reached.add(packet.stream_index)
            if len(reached) == len(streams):
                break
        else:
            packets.append(packet)
    return packets


def _time(packet: av.Packet) -> Fraction:
    stamps = [stamp for stamp in (packet.pts, packet.dts) if stamp is not None]
    return min(stamps) * packet.time_base


def _firsts(packets: list[av.Packet]) -> list[av.Packet]:
    """The first packet of each stream."""
    return list({packet.stream_index: packet for packet in reversed(packets)}.values())


def _skipped(packet: av.Packet) -> Fraction:
    """Seconds at the start of a packet that only warm the decoder up, and are not heard."""
    if not packet.has_sidedata("skip_samples"):
        return Fraction(0)
    (samples,) = struct.unpack("<I", bytes(packet.get_sidedata("skip_samples"))[:4])
    return Fraction(samples, packet.stream.codec_context.sample_rate)


def _kept(packets: list[av.Packet], streams: list[av.AudioStream], first: Fraction) -> bytes:
    """A file of the packets, their times counted from `first`."""
    for keeper in _KEEPERS:
        try:
            return _written(keeper, packets, streams, first)
        except (av.FFmpegError, ValueError):
            if keeper == _KEEPERS[-1]:
                raise
    raise AssertionError


def _written(
    keeper: str, packets: list[av.Packet], streams: list[av.AudioStream], first: Fraction
) -> bytes:
    file = io.BytesIO()
    used = {packet.stream_index for packet in packets}
    with av.open(file, "w", format=keeper) as output:
        copies = {s.index: _copy_stream(output, s) for s in streams if s.index in used}
        for packet in packets:
            output.mux(_moved(packet, copies[packet.stream_index], -first))
    return file.getvalue()


def add_sound(
    name: object, output: av.container.OutputContainer, sound: Sound
) -> tuple[av.container.InputContainer, dict[int, av.AudioStream]]:
    """Adds the streams of a sound to an output; gives the opened sound, and the streams by index.

    A codec that the output's container cannot hold is left out, with a warning that names it.
    """
    source = av.open(io.BytesIO(sound.data))
    copies = {}
    for stream in source.streams.audio:
        codec = stream.codec_context.name
        if _holds(output.format.name, stream):
            copies[stream.index] = _copy_stream(output, stream)
        else:
            warnings.warn(
                f"{name}: the sound is left out, {output.format.name} cannot hold {codec}: "
                "write .mkv to keep it",
                stacklevel=2,
            )
    return source, copies


def moved_packets(
    source: av.container.InputContainer, copies: dict[int, av.AudioStream], shift: Fraction
) -> Iterator[tuple[Fraction, av.Packet]]:
    """The packets of `add_sound` for its streams, later by `shift` seconds, each with its time."""
    for packet in source.demux([stream for stream in source.streams if stream.index in copies]):
        if packet.size:
            moved = _moved(packet, copies[packet.stream_index], shift)
            yield _time(moved), moved


def _holds(container: str, stream: av.AudioStream) -> bool:
    """Whether a container holds the stream's codec, by writing a header into memory."""
    try:
        with av.open(io.BytesIO(), "w", format=container) as trial:
            _copy_stream(trial, stream)
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


def _copy_stream(output: av.container.OutputContainer, stream: av.AudioStream) -> av.AudioStream:
    copy = output.add_stream_from_template(stream)
    if stream.language:
        copy.metadata["language"] = stream.language
    return copy


def _moved(packet: av.Packet, stream: av.AudioStream, shift: Fraction) -> av.Packet:
    ticks = round(shift / packet.time_base)
    packet.stream = stream
    packet.pts = None if packet.pts is None else packet.pts + ticks
    packet.dts = None if packet.dts is None else packet.dts + ticks
    return packet
