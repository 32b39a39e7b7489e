"""Words spoken by espeak-ng, one process a voice.

As a module: ``spoken`` starts the process and reads what it says. As a script, it is that process:
it loads the library through ctypes, speaks the utterances in the order given and writes their
samples to its standard output. What espeak-ng says depends on what it said before in the same
process, even after it is initialized anew; a fresh process and a fixed order give the same bytes.
The script needs nothing but the standard library, so that it starts quickly.
"""

from __future__ import annotations

import array
import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SYNCHRONOUS = 2
"""Audio goes to the callback, within the call that asks for it."""
BUFFER_MS = 500
RATE, PITCH = 1, 3
UTF8 = 1
SECONDS = 300.0
"""After which a process is taken for stuck."""
VARIANTS = ("voices", "!v")
"""Folder of the variants below that of espeak-ng's data."""


class Utterance(NamedTuple):
    """What is said and how. rate: words a minute; pitch: 0..100."""

    text: str
    rate: int
    pitch: int


def library_version(library: Path) -> str:
    """Version that the library itself states, such as "1.52.0"; nothing is initialized.

    Raises:
        OSError: not a library of this machine. AttributeError: a library, but not espeak-ng.
    """
    info = ctypes.CDLL(str(library)).espeak_Info
    info.restype = ctypes.c_char_p
    info.argtypes = [ctypes.c_void_p]
    return str((info(None) or b"?").decode())


def variants(data: Path) -> list[str]:
    """Names of the variants in espeak-ng's data, sorted; some hold blanks."""
    return sorted(p.name for p in data.joinpath(*VARIANTS).iterdir() if p.is_file())


def spoken(
    library: Path, data: Path, voice: str, utterances: Sequence[Utterance]
) -> tuple[int, list[array.array[int]]]:
    """Measurements a second, and those of each utterance (16 bits), said in a fresh process.

    Args:
        library: the shared library. data: the folder ``espeak-ng-data``.
        voice: ``<language>`` or ``<language>+<variant>``.

    Raises:
        ValueError: an unknown language or variant, silence, a process that failed.
    """
    _, plus, variant = voice.partition("+")
    # espeak-ng takes an unknown variant without a word and speaks with the plain voice.
    if plus and variant not in variants(data):
        raise ValueError(f"{data.joinpath(*VARIANTS)} has no variant {variant!r}")
    order = json.dumps([str(library), str(data), voice, utterances])
    # -I: the folder of this file, whose modules have common names, is not searched for imports.
    command = [sys.executable, "-I", __file__]
    try:
        done = subprocess.run(  # noqa: S603 - this file
            command, input=order.encode(), capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"voice {voice!r}: no end after {SECONDS:g} s") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").split("\n")
        told = next((line for line in reversed(lines) if line.strip()), "no message")
        raise ValueError(f"voice {voice!r}: exit {done.returncode}, {told.strip()}")
    return _read(done.stdout, voice, utterances)


def _read(
    raw: bytes, voice: str, utterances: Sequence[Utterance]
) -> tuple[int, list[array.array[int]]]:
    header, _, body = raw.partition(b"\n")
    rate_hz, *lengths = json.loads(header)
    samples = array.array("h", body)
    if len(lengths) != len(utterances) or len(samples) != sum(lengths):
        raise ValueError(f"voice {voice!r}: {len(samples)} samples of {lengths} came back")
    sounds, start = [], 0
    for length, utterance in zip(lengths, utterances, strict=True):
        sounds.append(samples[start : start + length])
        start += length
        if not any(sounds[-1]):
            raise ValueError(f"voice {voice!r}: {utterance.text!r} is silence")
    return rate_hz, sounds


def _speak(library: str, data: str, voice: str, utterances: Sequence[Sequence[object]]) -> None:
    """In the process of its own: a line of JSON (rate, lengths), then all samples."""
    espeak = ctypes.CDLL(library)
    take = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )
    pieces: list[bytes] = []

    def hear(samples: ctypes._Pointer[ctypes.c_short], count: int, events: object) -> int:
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = take(hear)
    rate_hz = espeak.espeak_Initialize(SYNCHRONOUS, BUFFER_MS, data.encode(), 0)
    if rate_hz <= 0:
        sys.exit(f"espeak-ng does not start with {data}")
    espeak.espeak_SetSynthCallback(callback)
    if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
        sys.exit("espeak-ng has no such language")
    espeak.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
        ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    # Some variants draw noise; the library seeds it with the time at which it is initialized.
    espeak.espeak_ng_SetRandSeed(1)
    sounds = []
    for text, rate, pitch in utterances:
        pieces.clear()
        espeak.espeak_SetParameter(RATE, rate, 0)
        espeak.espeak_SetParameter(PITCH, pitch, 0)
        words = str(text).encode()
        if espeak.espeak_Synth(words, len(words) + 1, 0, 0, 0, UTF8, None, None) != 0:
            sys.exit(f"espeak-ng cannot say {text!r}")
        espeak.espeak_Synchronize()
        sounds.append(b"".join(pieces))
    lengths = [len(sound) // 2 for sound in sounds]
    sys.stdout.buffer.write(json.dumps([rate_hz, *lengths]).encode() + b"\n" + b"".join(sounds))


if __name__ == "__main__":
    _speak(*json.loads(sys.stdin.buffer.read()))
