"""Files that are no radiographs, or would cost much to decode, uploaded to the running service."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from attacks.test_hostile_files import FROM_THE_HEADER, NO_RADIOGRAPHS

CORPUS = NO_RADIOGRAPHS | {what: make for what, (make, _) in FROM_THE_HEADER.items()}
MAX_BYTES = 64 * 2**20


def memory(process: psutil.Process, kind: str) -> int:
    """Bytes of a process: VmRSS resident now, VmHWM at most since it was reset, RssAnon without shared memory."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def test_at_least_sixty_malformed_files_get_4xx_within_5_s_and_64_mb_and_leave_nothing(
    service: Any, radiographs: dict[str, bytes]
) -> None:
    def post(frontal: bytes) -> httpx.Response:
        files = {**radiographs, "frontal": frontal}
        return httpx.post(f"{service.url}/v1/reconstructions", files=files, timeout=60, trust_env=False)

    def kept() -> set[Path]:
        """Files that the service keeps, without those of Ray."""
        return {path for path in service.scratch.rglob("*") if path.relative_to(service.scratch).parts[0] != "ray"}

    assert len(CORPUS) >= 60
    assert post(radiographs["frontal"]).status_code == 200
    ingress = service.replica("ingress")
    files, anonymous = kept(), memory(ingress, "RssAnon")
    for what, make in CORPUS.items():
        data = make()
        Path(f"/proc/{ingress.pid}/clear_refs").write_text("5")
        resident, begun = memory(ingress, "VmRSS"), time.monotonic()
        response = post(data)
        assert time.monotonic() - begun < 5, what
        assert memory(ingress, "VmHWM") - resident < MAX_BYTES, what
        assert response.status_code in (413, 415, 422), what
        detail = response.json()["detail"]
        assert "\n" not in detail, what
        assert len(detail) < 500, what
    # Ray's shared memory, which has the bodies, is resident once it was used.
    assert memory(ingress, "RssAnon") - anonymous < MAX_BYTES
    assert kept() == files
    assert post(radiographs["frontal"]).status_code == 200
