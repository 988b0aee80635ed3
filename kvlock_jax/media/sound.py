"""Copies the sound of a video bit for bit, packet by packet, cut to the frames taken."""

import collections
import contextlib
import io
import itertools
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

import av

from kvlock_jax.media.footage import Sound

_OVERHANG = Fraction(1, 10)  # seconds past the last frame that a packet may sound
_PCM = re.compile(r"pcm_[suf](\d+)")  # names with bits per sample
_KEEPERS = ("nut", "matroska", "mov", "mp4")
"""Containers to keep packets in; the source's own is tried first."""


def read_sound(
    name: object, container: av.container.InputContainer, start: Fraction, end: Fraction | None
) -> Sound | None:
    """Reads the packets of sound that begin before the frames taken end.

    Sound before the first frame is kept, and delays it (`Sound.lead`). Sound that cannot be read is
    left out, with a warning.

    Args:
      name: name of the file, for the warning.
      container: container at its start; after a seek, FFmpeg forgets what to skip at the start.
      start: time of the first frame in seconds, by the file's clock.
      end: time in seconds at which the last frame ends; None takes all sound.
    """
    streams = [s for s in container.streams.audio if s.codec_context and s.sample_rate]
    if not streams:
        return None
    try:
        packets = _packets(container, streams, end)
        if not packets:
            return None
        shown = min(_time(packet) + _skipped(packet) for packet in _firsts(packets))
        first = min(_time(packet) for packet in packets)
        rounding = max(packet.time_base for packet in packets)
        used = {packet.stream_index for packet in packets}
        streams = [stream for stream in streams if stream.index in used]
        data = _kept(container.format.name, packets, streams, first)
    except (av.FFmpegError, ValueError) as error:
        warnings.warn(f"{name}: the sound is left out, it cannot be copied ({error})", stacklevel=2)
        return None
    lead = start - shown
    if abs(lead) <= rounding:
        return Sound(data, shift=first - shown)
    return Sound(data, lead=max(Fraction(0), lead), shift=first - start)


def _packets(
    container: av.container.InputContainer,
    streams: list[av.AudioStream],
    end: Fraction | None,
) -> list[av.Packet]:
    """The packets of sound that begin before `end`."""
    packets, reached = [], set()
    for packet in container.demux(streams):
        if not packet.size or packet.pts is None:
            continue
        if end is not None and _time(packet) >= end:
            reached.add(packet.stream_index)
            if len(reached) == len(streams):
                break
        else:
            packets.append(packet if end is None else _cut(packet, end))
    return packets


def _cut(packet: av.Packet, end: Fraction) -> av.Packet:
    """Cuts a packet of PCM that goes far past `end`; any other stays whole."""
    codec = packet.stream.codec_context
    bits = _PCM.match(codec.name)
    if bits is None or _time(packet) + (packet.duration or 0) * packet.time_base < end + _OVERHANG:
        return packet
    samples = math.ceil((end - _time(packet)) * codec.sample_rate)
    length = samples * codec.channels * int(bits[1]) // 8
    if length >= packet.size:
        return packet
    cut = av.Packet(bytes(packet)[:length])
    cut.stream, cut.time_base = packet.stream, packet.time_base
    cut.pts, cut.dts, cut.is_keyframe = packet.pts, packet.pts, packet.is_keyframe
    cut.duration = round(Fraction(samples, codec.sample_rate) / packet.time_base)
    return cut


def _time(packet: av.Packet) -> Fraction:
    return packet.pts * packet.time_base


def _firsts(packets: list[av.Packet]) -> list[av.Packet]:
    """The first packet of each stream."""
    return list({packet.stream_index: packet for packet in reversed(packets)}.values())


def _skipped(packet: av.Packet) -> Fraction:
    """Seconds at the start of a packet that prime the decoder and are not heard."""
    if not packet.has_sidedata("skip_samples"):
        return Fraction(0)
    (samples,) = struct.unpack("<I", bytes(packet.get_sidedata("skip_samples"))[:4])
    return Fraction(samples, packet.stream.codec_context.sample_rate)


def _kept(
    source: str, packets: list[av.Packet], streams: list[av.AudioStream], first: Fraction
) -> bytes:
    """Writes the packets into a file in memory, their times counted from `first`."""
    family = [keeper for keeper in _KEEPERS if keeper in source]
    files = []
    for keeper in dict.fromkeys([*family, *_KEEPERS]):
        with contextlib.suppress(av.FFmpegError, ValueError):
            files.append(_written(keeper, packets, streams, first))
            with av.open(io.BytesIO(files[-1])) as kept:
                if _natures(kept.streams.audio) == _natures(streams):
                    return files[-1]
    for file in files:  # NUT forgets how some codecs place their channels
        with av.open(io.BytesIO(file)) as kept:
            if _codecs(kept.streams.audio) == _codecs(streams):
                return file
    raise ValueError(f"no container keeps {', '.join(_codecs(streams))}")


def _natures(streams: Sequence[av.AudioStream]) -> list[tuple[str, str]]:
    return [(stream.codec_context.name, stream.codec_context.layout.name) for stream in streams]


def _codecs(streams: Sequence[av.AudioStream]) -> list[str]:
    return [stream.codec_context.name for stream in streams]


def _written(
    keeper: str,
    packets: Iterable[av.Packet],
    streams: Sequence[av.AudioStream],
    first: Fraction,
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=keeper) as output:
        copies = {stream.index: _copy_stream(output, stream) for stream in streams}
        for packet in packets:
            output.mux(_moved(packet, copies[packet.stream_index], -first))
    return file.getvalue()


@contextlib.contextmanager
def copying(
    name: object, output: av.container.OutputContainer, sound: Sound | None
) -> Iterator[Callable[[Fraction], None]]:
    """Copies a sound into an output. Enter it before anything is muxed.

    A codec that the output's container cannot hold is left out, with a warning that names it.

    Yields:
      A function that copies the packets up to a time of the output in seconds, to be called before
      each frame is muxed. The rest is copied at the end.
    """
    if sound is None:
        yield lambda time: None
        return
    with av.open(io.BytesIO(sound.data)) as source:
        copies = {}
        for stream in source.streams.audio:
            if _holds(output.format.name, sound, stream.index):
                copies[stream.index] = _copy_stream(output, stream)
            else:
                problem = f"the container cannot hold {stream.codec_context.name}"
                hint = ", .mkv can" if _holds("matroska", sound, stream.index) else ""
                warnings.warn(f"{name}: the sound is left out: {problem}{hint}", stacklevel=5)
        packets = _shifted(source, copies, sound.shift + sound.lead)
        waiting = collections.deque(itertools.islice(packets, 1))

        def copy_until(time: Fraction | None) -> None:
            """Copies the packets up to a time; all that are left where it is `None`."""
            while waiting and (time is None or _time(waiting[0]) <= time):
                output.mux(waiting.popleft())
                waiting.extend(itertools.islice(packets, 1))

        yield copy_until
        copy_until(None)


def _shifted(
    source: av.container.InputContainer, copies: Mapping[int, av.AudioStream], shift: Fraction
) -> Iterator[av.Packet]:
    """Yields the packets for the copies of their streams, `shift` seconds later."""
    if not copies:
        return
    for packet in source.demux([s for s in source.streams.audio if s.index in copies]):
        if packet.size:
            yield _moved(packet, copies[packet.stream_index], shift)


def _holds(container: str, sound: Sound, index: int) -> bool:
    """Whether a container can hold a stream of the sound; found out by writing it into memory."""
    try:
        with av.open(io.BytesIO(sound.data)) as source:
            stream = source.streams[index]
            packets = (packet for packet in source.demux(stream) if packet.size)
            _written(container, packets, [stream], Fraction(0))
    except (av.FFmpegError, ValueError):
        return False
    return True


def _copy_stream(output: av.container.OutputContainer, stream: av.AudioStream) -> av.AudioStream:
    copy = output.add_stream_from_template(stream)
    if stream.language:
        copy.metadata["language"] = stream.language
    channels = stream.codec_context.channels
    if stream.codec_context.layout.name == f"{channels} channels":  # AVI does not place them
        copy.codec_context.layout = {1: "mono", 2: "stereo"}.get(channels, copy.layout)
    return copy


def _moved(packet: av.Packet, stream: av.AudioStream, shift: Fraction) -> av.Packet:
    """Copies a packet for another stream, `shift` seconds later.

    The copy has no side data: its time before zero already says what to skip at the start.
    """
    tick = min(packet.time_base, Fraction(1, stream.codec_context.sample_rate))
    copy = av.Packet(bytes(packet))
    copy.stream, copy.time_base = stream, tick
    copy.pts = round((packet.pts * packet.time_base + shift) / tick)
    copy.dts = copy.pts
    copy.duration = round((packet.duration or 0) * packet.time_base / tick)
    copy.is_keyframe = packet.is_keyframe
    return copy
