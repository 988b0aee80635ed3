"""`kvlock mask`: a mask of every frame, from boxes or masks of a few."""

import argparse
import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvlock_jax import masks
from kvlock_jax.cli.terminal import say, warnings_as_lines
from kvlock_jax.errors import InputError
from kvlock_jax.masks.keyframes import check_numbers, parse_boxes, parse_files
from kvlock_jax.masks.motion import opencv
from kvlock_jax.media import encode, room, storage
from kvlock_jax.media.decode import Video, read_video
from kvlock_jax.media.folders import IMAGE_SUFFIXES
from kvlock_jax.media.footage import Footage
from kvlock_jax.media.masks import bbox_mask, read_mask
from kvlock_jax.pipeline.outputs import Outputs, check_outputs, probe_outputs
from kvlock_jax.pipeline.report import outlined
from kvlock_jax.shapes import Mask


def add(commands: Any) -> None:
    """Adds the command to the program's parser."""
    about = "Make a mask of every frame of a video, from boxes or masks of a few."
    tail = (
        "Between two frames that are given the mask changes evenly, or with --track follows the "
        "object. Frames are counted from 0. Where the object is lost the mask is empty; give a box "
        "or a mask of a frame there."
    )
    parser = commands.add_parser("mask", description=about, epilog=tail, allow_abbrev=False)
    parser.set_defaults(command=_command)
    add = parser.add_argument
    add("--src_video", "--video", required=True, help="a video or a folder of images")
    about = "a box in pixels of the video, or boxes of some frames: 0:X0,Y0,X1,Y1 40:..."
    add("--bbox", nargs="+", metavar="X0,Y0,X1,Y1", help=about)
    about = "a mask of frame 0, or masks of some frames: 0:a.png 40:b.png; images or .npy"
    add("--src_mask", "--mask", nargs="+", metavar="FILE", help=about)
    add("--track", action="store_true", help="follow what the boxes or masks show (OpenCV)")
    about = f"the mask, lossless: {', '.join(encode.CONTAINERS)}; .mkv is smallest"
    add("--save_file", "--output", required=True, metavar="VIDEO", help=about)
    add("--compare", metavar="VIDEO", help="write the video with the mask's outline")
    add("--frame_num", type=int, help="number of frames to take from the start; by default all")


def _command(args: argparse.Namespace, others: list[str]) -> None:
    if others:
        raise InputError(f"unknown argument {others[0]}; see kvlock mask --help")
    if (args.src_mask is None) == (args.bbox is None):
        raise InputError(
            "give either --bbox 0:x0,y0,x1,y1 or --src_mask 0:FILE, of one frame or more"
        )
    if args.frame_num is not None and args.frame_num < 1:
        raise InputError(f"--frame_num must be 1 or more, found {args.frame_num}")
    if args.track:
        opencv()  # an error now, not after the video is read
    given = _given(args)
    files = [path for path in given.values() if isinstance(path, str)]
    outputs = Outputs(args.save_file, compare=args.compare)
    check_outputs(outputs, {"src_video": [args.src_video], "src_mask": files})
    probe_outputs(outputs)
    with warnings_as_lines():
        video, keyframes = _read(args, given)
        count, height, width = video.frames.shape[:3]
        say("video", f"{count} frames of {width}x{height} at {float(video.fps):g} per second")
        lost = np.zeros(count, bool)
        if args.track:
            followed = masks.follow(video.frames, keyframes)
            mask, lost = followed.mask, followed.lost
        elif args.bbox is not None:
            mask = masks.boxes(given, count, height, width)
        else:
            mask = masks.shapes(keyframes, count)
        there = mask.any(axis=(1, 2))
        share = f"{100 * room.share(mask):.1f} % of the pixels"
        say("mask", f"{share}, in {', '.join(map(_span, masks.spans(there)))}")
        for span in masks.spans(lost):
            say("lost", f"{_span(span)}: the mask is empty; give a box or a mask of a frame there")
        _write(args, video, mask)


def _given(args: argparse.Namespace) -> Mapping[int, Any]:
    """Boxes or paths by the number of their frame; one box alone is of frame 0."""
    if args.bbox is None:
        files = parse_files(args.src_mask)
        return {number: storage.resolve(path) for number, path in files.items()}
    found = parse_boxes(args.bbox)
    return found if isinstance(found, Mapping) else {0: found}


def _read(
    args: argparse.Namespace, given: Mapping[int, Any]
) -> tuple[Video, Mapping[int, np.ndarray]]:
    """The video, and the masks of the frames that are given."""
    with contextlib.ExitStack() as copies:
        source = storage.at_hand(copies, storage.resolve(args.src_video), IMAGE_SUFFIXES)
        video = read_video(source, args.frame_num)
        check_numbers("src_mask" if args.bbox is None else "bbox", given, len(video.frames))
        size, found = video.frames.shape[1:3], {}
        for number, one in given.items():
            if not isinstance(one, str):
                found[number] = bbox_mask(one, 1, *size)[0]
                continue
            found[number] = read_mask(storage.at_hand(copies, one, IMAGE_SUFFIXES), 1, *size)[0]
            if not found[number].any():
                raise InputError(f"mask {one}: is empty, no pixel is over half of white")
    return video, found


def _span(span: tuple[int, int]) -> str:
    first, last = span
    return f"frame {first}" if first == last else f"frames {first} to {last}"


def _write(args: argparse.Namespace, video: Video, mask: Mask) -> None:
    """Writes the mask at the video's times, and the video with its outline."""
    # One channel in memory, seen thrice.
    white = np.broadcast_to((mask.view(np.uint8) * np.uint8(255))[..., None], (*mask.shape, 3))
    # Its pixels are called square, for FFV1's sake: nothing looks at their shape in a mask.
    footage = Footage(times=video.times)
    encode.write_video(args.save_file, white, video.fps, lossless=True, footage=footage)
    say("wrote", args.save_file)
    if args.compare:
        footage = Footage(times=video.times, pixel_aspect=video.pixel_aspect)
        drawn = room.mapped(outlined, video.frames, mask, name="the comparison")
        encode.write_video(args.compare, drawn, video.fps, footage=footage)
        say("wrote", args.compare)
