"""Deinterlaces video with FFmpeg's bwdif."""

from collections.abc import Iterable, Iterator

import av
import av.filter


def progressive(stream: av.VideoStream, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Deinterlaces the interlaced frames among `frames`; their number stays."""
    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = _graph(stream)
        if graph is None:
            yield frame
        else:
            graph.vpush(frame)
            yield from _ready(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _ready(graph)


def _graph(stream: av.VideoStream) -> av.filter.Graph:
    graph = av.filter.Graph()
    bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(graph.add_buffer(template=stream), bwdif, graph.add("buffersink")).configure()
    return graph


def _ready(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """The frames that the filter has finished."""
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
