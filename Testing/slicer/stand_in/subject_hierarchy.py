"""Data nodes appear in the subject hierarchy, as the application's plugins see to it."""

from __future__ import annotations

from typing import Any

import slicer
import vtk

_LISTED = (
    "vtkMRMLVolumeNode",
    "vtkMRMLSegmentationNode",
    "vtkMRMLMarkupsNode",
    "vtkMRMLModelNode",
    "vtkMRMLTransformNode",
    "vtkMRMLTableNode",
    "vtkMRMLTextNode",
    "vtkMRMLSequenceNode",
)


def keep_subject_hierarchy(scene: Any) -> None:
    """Give every data node of the scene its item while the scene lives, and take it away with the node."""

    def listed(node: Any) -> bool:
        return not node.GetHideFromEditors() and any(node.IsA(kind) for kind in _LISTED)

    def add_item(node: Any) -> None:
        tree = scene.GetSubjectHierarchyNode()
        if tree is not None and listed(node) and not tree.GetItemByDataNode(node):
            tree.CreateItem(tree.GetSceneItemID(), node)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def added(caller: Any, event: str, node: Any) -> None:
        if not scene.IsBatchProcessing():
            add_item(node)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def about_to_be_removed(caller: Any, event: str, node: Any) -> None:
        tree = scene.GetSubjectHierarchyNode()
        if scene.IsClosing() or tree is None or not listed(node):
            return
        item = tree.GetItemByDataNode(node)
        if item:
            tree.RemoveItem(item, False, False)

    def batch_ended(caller: Any, event: str) -> None:
        for index in range(scene.GetNumberOfNodes()):
            add_item(scene.GetNthNode(index))

    scene.AddObserver(slicer.vtkMRMLScene.NodeAddedEvent, added)
    scene.AddObserver(slicer.vtkMRMLScene.NodeAboutToBeRemovedEvent, about_to_be_removed)
    scene.AddObserver(slicer.vtkMRMLScene.EndBatchProcessEvent, batch_ended)
