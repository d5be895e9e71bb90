"""The API's calls about dicts: what all containers read and write, one at a time."""

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.loopback_modal.plane import Plane


class Dicts:
    """Handlers; entries are whatever bytes the client makes of keys and values."""

    plane: Plane

    async def DictGetOrCreate(self, request, task):
        """Find a dict by name, or make one."""
        name = request.deployment_name
        if name not in self.plane.dicts:
            if request.object_creation_type == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
                raise GRPCError(Status.NOT_FOUND, f"Dict '{name}' not found in environment 'main'")
            self.plane.dicts[name] = {}
        metadata = api_pb2.DictMetadata(name=name)
        return api_pb2.DictGetOrCreateResponse(dict_id=f"di-{name}", metadata=metadata)

    async def DictGet(self, request, task):
        """Return what stands under a key."""
        value = self._entries(request).get(request.key)
        return api_pb2.DictGetResponse(found=value is not None, value=value)

    async def DictUpdate(self, request, task):
        """Write entries; with `if_not_exists` only new ones, and tell whether any was."""
        entries = self._entries(request)
        created = False
        for each in request.updates:
            is_new = each.key not in entries
            if is_new or not request.if_not_exists:
                entries[each.key] = each.value
                created = created or is_new
        return api_pb2.DictUpdateResponse(created=created)

    def _entries(self, request) -> dict[bytes, bytes]:
        return self.plane.dicts[request.dict_id.removeprefix("di-")]
