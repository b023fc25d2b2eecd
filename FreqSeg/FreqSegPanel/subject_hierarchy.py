"""Where nodes lie in the tree of patients, studies and folders."""

from __future__ import annotations

import slicer


def put_beside(node, other) -> None:
    """Put a node under the same study or folder as another; DICOM export of a segmentation needs that."""
    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    if tree is None:
        return
    parent = tree.GetItemParent(_item(tree, other))
    tree.SetItemParent(_item(tree, node), parent or tree.GetSceneItemID())


def _item(tree, node) -> int:
    return tree.GetItemByDataNode(node) or tree.CreateItem(tree.GetSceneItemID(), node)
