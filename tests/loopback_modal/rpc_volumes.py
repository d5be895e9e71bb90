"""The API's calls about volumes: commit and reload from containers, listing and copying from the
client."""

import asyncio
import shutil
import time
from pathlib import Path

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.loopback_modal.containers import Containers, volume_metadata
from tests.loopback_modal.plane import Plane

BLOCK_BYTES = 8 * 1024 * 1024
UNNAMED = (
    api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL,
    api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP,
)


class Volumes:
    """Handlers; `task` is the container that calls, or None for the client."""

    plane: Plane
    containers: Containers

    async def VolumeGetOrCreate(self, request, task):
        """Find a volume by name, or make one."""
        name, kind = request.deployment_name, request.object_creation_type
        found = None if kind in UNNAMED else self.plane.volume_named(name)
        if found and kind == api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise GRPCError(Status.ALREADY_EXISTS, f"Volume {name} already exists")
        if not found and kind == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            raise GRPCError(Status.NOT_FOUND, f"Volume '{name}' not found in environment 'main'")
        volume = found or self.plane.add_volume(name, request.version)
        metadata = volume_metadata(self.plane, volume.id)
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=volume.id, version=volume.version, metadata=metadata
        )

    async def VolumeList(self, request, task):
        """List named volumes."""
        rows = [
            api_pb2.VolumeListItem(
                label=v.name,
                volume_id=v.id,
                created_at=time.time(),
                metadata=volume_metadata(self.plane, v.id),
            )
            for v in self.plane.volumes.values()
            if v.name
        ]
        return api_pb2.VolumeListResponse(environment_name="main", items=rows)

    async def VolumeDelete(self, request, task):
        """Delete a volume with everything on it."""
        volume = self.plane.volumes.pop(request.volume_id)
        shutil.rmtree(volume.path)

    # -- from containers

    async def VolumeCommit(self, request, task):
        """Publish a container's changes."""
        view = self._view(request.volume_id, task, "commit")
        await asyncio.to_thread(view.commit)
        return api_pb2.VolumeCommitResponse(skip_reload=True)

    async def VolumeReload(self, request, task):
        """Let a container see others' changes, unless it holds a file open."""
        view = self._view(request.volume_id, task, "reload")
        self.containers.refuse_open_files(task, request.volume_id)
        await asyncio.to_thread(view.reload)

    def _view(self, id: str, task, verb: str):
        if task is None or id not in task.views:
            raise GRPCError(
                Status.FAILED_PRECONDITION, f"{verb}() needs a container that has the volume"
            )
        return task.views[id]

    # -- from the client

    def _path(self, id: str, path: str) -> Path:
        root = self.plane.volumes[id].path
        full = (root / path.lstrip("/")).resolve()
        if not full.is_relative_to(root.resolve()):
            raise GRPCError(Status.INVALID_ARGUMENT, f"{path} is outside the volume")
        return full

    def _listed(self, request) -> list[api_pb2.FileEntry]:
        root, full = (
            self.plane.volumes[request.volume_id].path,
            self._path(request.volume_id, request.path),
        )
        if not full.exists():
            raise GRPCError(Status.NOT_FOUND, f"No such file or directory: {request.path}")
        if full.is_file():
            return [_entry(root, full)]
        found = full.rglob("*") if request.recursive else full.iterdir()
        return [_entry(root, path) for path in sorted(found)]

    async def VolumeListFiles(self, request, task):
        """List a directory of a volume of version 1."""
        yield api_pb2.VolumeListFilesResponse(entries=self._listed(request))

    async def VolumeListFiles2(self, request, task):
        """List a directory of a volume of version 2."""
        yield api_pb2.VolumeListFiles2Response(entries=self._listed(request))

    async def VolumePutFiles(self, request, task):
        """Take files, whose contents were sent like code, onto a volume of version 1."""
        for file in request.files:
            target = self._writable(request, file.filename)
            shutil.copyfile(self.plane.blobs / file.sha256_hex, target)

    async def VolumePutFiles2(self, request, task):
        """Ask for the blocks that are missing; once none is, write the files (volumes of version
        2)."""
        targets = [self._writable(request, file.path) for file in request.files]
        missing = self._missing_blocks(request)
        if not missing:
            for file, target in zip(request.files, targets, strict=True):
                self._write_blocks(file, target)
        return api_pb2.VolumePutFiles2Response(missing_blocks=missing)

    def _writable(self, request, path: str) -> Path:
        target = self._path(request.volume_id, path)
        if request.disallow_overwrite_existing_files and target.exists():
            raise GRPCError(Status.ALREADY_EXISTS, f"{path}: already exists")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _missing_blocks(self, request) -> list[api_pb2.VolumePutFiles2Response.MissingBlock]:
        wanted = {}
        for at, file in enumerate(request.files):
            for number, block in enumerate(file.blocks):
                wanted.setdefault(block.contents_sha256.hex(), (at, number))
        return [
            api_pb2.VolumePutFiles2Response.MissingBlock(
                file_index=at, block_index=number, put_url=f"{self.plane.http}/block/{sha}"
            )
            for sha, (at, number) in wanted.items()
            if not (self.plane.blobs / f"block-{sha}").exists()
        ]

    def _write_blocks(self, file, target: Path) -> None:
        part = target.with_name(f"{target.name}.loopback")
        with part.open("wb") as out:
            for number, block in enumerate(file.blocks):
                out.seek(number * BLOCK_BYTES)
                out.write((self.plane.blobs / f"block-{block.contents_sha256.hex()}").read_bytes())
            out.truncate(file.size)
        part.replace(target)

    async def VolumeGetFile2(self, request, task):
        """Say where to fetch a file's blocks."""
        full = self._path(request.volume_id, request.path)
        if not full.is_file():
            raise GRPCError(Status.NOT_FOUND, f"No such file: {request.path}")
        size = full.stat().st_size
        count = min(request.len or size, max(0, size - request.start))
        urls, at, end = [], request.start, request.start + count
        while at < end:
            stop = min(end, (at // BLOCK_BYTES + 1) * BLOCK_BYTES)
            place = f"{request.volume_id}/{at}/{stop - at}/{request.path.lstrip('/')}"
            urls.append(f"{self.plane.http}/file/{place}")
            at = stop
        return api_pb2.VolumeGetFile2Response(
            get_urls=urls, size=size, start=request.start, len=count
        )

    async def VolumeRemoveFile2(self, request, task):
        """Remove a file, or a directory when asked to."""
        full = self._path(request.volume_id, request.path)
        if full.is_dir() and request.recursive:
            shutil.rmtree(full)
        elif full.is_file():
            full.unlink()
        else:
            raise GRPCError(Status.NOT_FOUND, f"No such file: {request.path}")

    VolumeRemoveFile = VolumeRemoveFile2


def _entry(root: Path, path: Path) -> api_pb2.FileEntry:
    status = path.lstat()
    kind = api_pb2.FileEntry.DIRECTORY if path.is_dir() else api_pb2.FileEntry.FILE
    name = path.relative_to(root.resolve()).as_posix()
    return api_pb2.FileEntry(path=name, type=kind, mtime=int(status.st_mtime), size=status.st_size)
