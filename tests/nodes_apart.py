"""Ray's provider of nodes that are processes of one machine, with a folder for each of them.

In a common one they share the code that a driver ships, and one node deletes it under the other's workers.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class NodesApart(FakeMultiNodeProvider):
    """provider.folder: where the folders go; a short path, for Ray puts sockets in them."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:
            place = f"{self.provider_config['folder']}/node{self._next_node_id}"
            with mock.patch.object(parameter, "RayParams", partial(parameter.RayParams, temp_dir=place)):
                super()._create_node_with_resources_and_labels(*arguments)
