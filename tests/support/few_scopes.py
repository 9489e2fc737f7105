"""pytest-xdist's scheduler of groups, with the tests of a large file in one piece of work.

A test without a group is a piece of its own there. With ten thousand of them the scheduler, which counts in all pieces after
every test, takes half a minute of a third process, and what a file's tests share is made in every process.
"""

from collections import Counter

from xdist.scheduler import LoadGroupScheduling

LARGE = 20  # tests of a file; smaller ones are what is left to distribute at the end


class FewScopes(LoadGroupScheduling):
    def schedule(self) -> None:
        if self.collection is None:
            node_ids = next(iter(self.registered_collections.values()))
            self.tests_of = Counter(_file(node_id) for node_id in node_ids)
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        """The group; the file, if it is large; or else the test."""
        scope = super()._split_scope(nodeid)
        return _file(nodeid) if scope == nodeid and self.tests_of[_file(nodeid)] >= LARGE else scope


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
