"""The API's calls about sessions, apps, images, code mounts, secrets and blobs."""

import hashlib
import platform
import time

from google.protobuf.timestamp_pb2 import Timestamp
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.loopback_modal.containers import Containers, layout
from tests.loopback_modal.plane import Plane, Result
from tests.loopback_modal.records import known, pause

BUILDER = "2025.06"  # the image builder the client is told to use
SUCCESS = Result(status=Result.GENERIC_STATUS_SUCCESS)


class Apps:
    """Handlers; `task` is the container that calls, or None for the client."""

    plane: Plane
    containers: Containers

    async def EnvironmentGetOrCreate(self, request, task):
        """Say that there is one environment."""
        settings = api_pb2.EnvironmentSettings(image_builder_version=BUILDER)
        metadata = api_pb2.EnvironmentMetadata(
            name=request.deployment_name or "main", settings=settings
        )
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    # -- apps

    async def AppCreate(self, request, task):
        """Start an app."""
        app = self.plane.add_app(request.description, request.app_state)
        url = f"{self.plane.http}/apps/{app.id}"
        return api_pb2.AppCreateResponse(app_id=app.id, app_page_url=url, app_logs_url=url)

    async def AppGetByDeploymentName(self, request, task):
        """Find a deployment."""
        app = self.plane.deployed.get(request.name)
        return api_pb2.AppGetByDeploymentNameResponse(
            app_id=app.id if app else "", environment_name="main"
        )

    async def AppGetOrCreate(self, request, task):
        """Find a deployment, as who looks it up does."""
        app = self.plane.deployed.get(request.app_name)
        if app is None:
            raise GRPCError(Status.NOT_FOUND, f"No App named {request.app_name!r}")
        return api_pb2.AppGetOrCreateResponse(app_id=app.id)

    async def AppGetLayout(self, request, task):
        """Tell what an app consists of."""
        return api_pb2.AppGetLayoutResponse(
            app_layout=layout(self.plane, self.plane.apps[request.app_id])
        )

    async def AppHeartbeat(self, request, task):
        """Take note of nothing: an app here ends with its client or by being stopped."""

    async def AppPublish(self, request, task):
        """Make an app's functions callable, and known by name when it is deployed."""
        app = self.plane.apps[request.app_id]
        app.function_ids, app.class_ids = dict(request.function_ids), dict(request.class_ids)
        app.state = request.app_state or app.state
        if request.app_state == api_pb2.APP_STATE_DEPLOYED:
            app.name = request.name
            self.plane.deployed[app.name] = app
            # As it rolls on, what began before ends its requests and gets no more
            for task in app.tasks:
                await self.containers.drain(task)
        return api_pb2.AppPublishResponse(
            url=f"{self.plane.http}/apps/{app.id}", deployed_at=time.time()
        )

    async def AppClientDisconnect(self, request, task):
        """Stop an app whose client has gone, unless it is deployed, or detached and only
        interrupted."""
        app = self.plane.apps[request.app_id]
        interrupted = request.reason == api_pb2.APP_DISCONNECT_REASON_KEYBOARD_INTERRUPT
        stays = app.state == api_pb2.APP_STATE_DETACHED and interrupted
        if app.state != api_pb2.APP_STATE_DEPLOYED and not stays:
            self.plane.later(self.containers.stop(app))

    async def AppStop(self, request, task):
        """End its containers and forget its name."""
        app = self.plane.apps[request.app_id]
        self.plane.deployed.pop(app.name, None)
        await self.containers.stop(app)

    async def AppGetLifecycle(self, request, task):
        """Tell an app's state."""
        app = self.plane.apps[request.app_id]
        lifecycle = api_pb2.AppLifecycle(app_state=app.state, created_at=app.created)
        return api_pb2.AppGetLifecycleResponse(lifecycle=lifecycle)

    async def AppList(self, request, task):
        """Show every run and deployment so far."""
        item = api_pb2.AppListResponse.AppListItem
        rows = [
            item(
                app_id=a.id,
                description=a.description,
                state=a.state,
                created_at=a.created,
                name=a.name,
                n_running_tasks=len(a.tasks),
            )
            for a in self.plane.apps.values()
        ]
        return api_pb2.AppListResponse(apps=rows)

    async def AppGetLogs(self, request, task):
        """Stream what an app prints; the last message says that it is over."""
        app = self.plane.apps[request.app_id]
        at, until = (
            int((request.last_entry_id or "0-0").split("-")[0]),
            time.monotonic() + request.timeout,
        )
        while True:
            for batch in app.logs[at:]:
                at += 1
                yield batch
            if app.done:
                yield api_pb2.TaskLogsBatch(app_done=True)
                return
            if time.monotonic() >= until:
                return
            await pause(app.changed, 0.5)

    async def AppFetchLogs(self, request, task):
        """Return what an app has printed."""
        logs = self.plane.apps[request.app_id].logs
        return api_pb2.AppFetchLogsResponse(
            batches=logs[-request.limit :] if request.limit else logs
        )

    async def TaskList(self, request, task):
        """List containers."""
        rows = [
            api_pb2.TaskStats(
                task_id=t.id,
                app_id=app.id,
                app_description=app.description,
                started_at=t.last_active,
                enqueued_at=t.last_active,
            )
            for app in self.plane.apps.values()
            if request.app_id in ("", app.id)
            for t in app.tasks
        ]
        return api_pb2.TaskListResponse(tasks=rows)

    # -- images and code

    async def ImageGetOrCreate(self, request, task):
        """Record a layer's recipe; nothing is built, containers use this interpreter's packages."""
        digest = hashlib.sha256(request.image.SerializeToString(deterministic=True)).hexdigest()
        self.plane.images[f"im-{digest[:16]}"] = request.image
        recipe = "\n".join(request.image.dockerfile_commands)
        (self.plane.made("images") / f"{digest[:16]}.txt").write_text(recipe, "utf-8")
        metadata = api_pb2.ImageMetadata(
            image_builder_version=request.builder_version,
            workdir="/root",
            python_version_info=f"Python {platform.python_version()}",
        )
        return api_pb2.ImageGetOrCreateResponse(
            image_id=f"im-{digest[:16]}", result=SUCCESS, metadata=metadata
        )

    async def MountBatchedCheckExistence(self, request, task):
        """Tell which files of a code mount are not here yet."""
        now = Timestamp()
        now.GetCurrentTime()
        missing = [
            sha for sha in request.sha256_hex_hashes if not (self.plane.blobs / sha).exists()
        ]
        return known(
            api_pb2.MountBatchedCheckExistenceResponse,
            missing_sha256_hex_hashes=missing,
            checked_at=now,
        )

    async def MountPutFile(self, request, task):
        """Take a file of a code mount, in the message or as a blob that was uploaded before."""
        path = self.plane.blobs / request.sha256_hex
        if request.data_blob_id:
            (self.plane.blobs / request.data_blob_id).replace(path)
        elif request.WhichOneof("data_oneof") == "data":
            path.write_bytes(request.data)
        return api_pb2.MountPutFileResponse(exists=path.exists())

    async def MountGetOrCreate(self, request, task):
        """Record a code mount; the named ones hold the client and Python, which are here."""
        id = f"mo-{request.deployment_name}" if request.deployment_name else self.plane.new_id("mo")
        self.plane.mounts[id] = list(request.files)
        names = repr(sorted((file.filename, file.sha256_hex) for file in request.files))
        digest = hashlib.sha256(names.encode()).hexdigest()
        metadata = api_pb2.MountHandleMetadata(content_checksum_sha256_hex=digest)
        return api_pb2.MountGetOrCreateResponse(mount_id=id, handle_metadata=metadata)

    # -- secrets and blobs

    async def SecretGetOrCreate(self, request, task):
        """Find a secret by name and check its keys, or make one."""
        name = request.deployment_name
        if request.object_creation_type == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            id = self.plane.secret_ids.get(name)
            if id is None:
                raise GRPCError(
                    Status.NOT_FOUND, f"Secret '{name}' not found in environment 'main'"
                )
            missing = [key for key in request.required_keys if key not in self.plane.secrets[id]]
            if missing:
                text = f"Secret '{name}' is missing key(s): {', '.join(missing)}"
                raise GRPCError(Status.FAILED_PRECONDITION, text)
        else:
            id = self.plane.add_secret(name, request.env_dict)
        metadata = known(api_pb2.SecretMetadata, name=name, keys=sorted(self.plane.secrets[id]))
        return api_pb2.SecretGetOrCreateResponse(secret_id=id, metadata=metadata)

    async def SecretList(self, request, task):
        """List named secrets."""
        rows = [
            known(
                api_pb2.SecretListItem,
                label=name,
                secret_id=id,
                created_at=time.time(),
                metadata=known(
                    api_pb2.SecretMetadata, name=name, keys=sorted(self.plane.secrets[id])
                ),
            )
            for name, id in sorted(self.plane.secret_ids.items())
        ]
        return api_pb2.SecretListResponse(items=rows, environment_name="main")

    async def BlobCreate(self, request, task):
        """Say where to send arguments or results that are too large for a message."""
        id = self.plane.new_id("bl")
        url = f"{self.plane.http}/blob/{id}"
        urls = api_pb2.UploadUrlList(items=[url])
        return api_pb2.BlobCreateResponse(
            blob_id=id, blob_ids=[id], upload_url=url, upload_urls=urls
        )

    async def BlobGet(self, request, task):
        """Say where to fetch them."""
        return api_pb2.BlobGetResponse(download_url=f"{self.plane.http}/blob/{request.blob_id}")
