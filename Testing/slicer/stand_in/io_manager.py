"""Files in and out: what ``slicer.util.loadVolume``, ``saveNode``, ``loadScene``, ... ask of the application."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import slicer

_EXTENSIONS = {
    ".seg.nrrd": "SegmentationFile",
    ".seg.vtm": "SegmentationFile",
    ".mrk.json": "MarkupsFile",
    ".nii.gz": "VolumeFile",
    ".nii": "VolumeFile",
    ".nrrd": "VolumeFile",
    ".nhdr": "VolumeFile",
    ".mha": "VolumeFile",
    ".mhd": "VolumeFile",
    ".dcm": "VolumeFile",
    ".tif": "VolumeFile",
    ".png": "VolumeFile",
    ".jpg": "VolumeFile",
    ".h5": "TransformFile",
    ".tfm": "TransformFile",
    ".csv": "TableFile",
    ".tsv": "TableFile",
    ".txt": "TextFile",
    ".json": "TextFile",
    ".vtk": "ModelFile",
    ".vtp": "ModelFile",
    ".stl": "ModelFile",
    ".ply": "ModelFile",
    ".obj": "ModelFile",
    ".ctbl": "ColorTableFile",
    ".mrml": "SceneFile",
    ".mrb": "SceneFile",
}
_BY_STORAGE_NODE = {
    "MarkupsFile": ("vtkMRMLMarkupsFiducialNode", "vtkMRMLMarkupsJsonStorageNode"),
    "TransformFile": ("vtkMRMLTransformNode", "vtkMRMLTransformStorageNode"),
    "TableFile": ("vtkMRMLTableNode", "vtkMRMLTableStorageNode"),
    "TextFile": ("vtkMRMLTextNode", "vtkMRMLTextStorageNode"),
    "ModelFile": ("vtkMRMLModelNode", "vtkMRMLModelStorageNode"),
    "ColorTableFile": ("vtkMRMLColorTableNode", "vtkMRMLColorTableStorageNode"),
}


class CoreIOManager:
    """Reads and writes through MRML's own storage nodes and logics."""

    def fileType(self, filename: str) -> str:
        name = str(filename).lower()
        for extension in sorted(_EXTENSIONS, key=len, reverse=True):
            if name.endswith(extension):
                return _EXTENSIONS[extension]
        return "NoFile"

    def loadNodes(self, filetype: str, properties: dict[str, Any], loaded: Any = None, messages: Any = None) -> bool:
        path = str(properties["fileName"])
        if not os.path.exists(path):
            self._say(messages, f"file not found: {path}")
            return False
        if filetype == "SceneFile":
            return self._load_scene(path, bool(properties.get("clear", False)))
        name = properties.get("name") or self._node_name(path)
        if filetype == "VolumeFile":
            node = self._load_volume(path, name, properties)
        elif filetype == "SegmentationFile":
            node = self._load_segmentation(path, name)
        elif filetype in _BY_STORAGE_NODE:
            node = self._load_by_storage_node(path, name, *_BY_STORAGE_NODE[filetype])
        else:
            self._say(messages, f"no reader for {filetype} {path}")
            return False
        if node is None:
            self._say(messages, f"could not read {path}")
            return False
        if loaded is not None:
            loaded.AddItem(node)
        return True

    def fileWriterFileType(self, node: Any, fileFormat: str = "") -> str:
        if node.IsA("vtkMRMLSegmentationNode"):
            return "SegmentationFile"
        return "VolumeFile" if node.IsA("vtkMRMLVolumeNode") else "NodeFile"

    def fileWriterExtensions(self, node: Any) -> list[str]:
        storage = node.CreateDefaultStorageNode()
        types = storage.GetSupportedWriteFileTypes()
        extensions = [types.GetValue(index) for index in range(types.GetNumberOfValues())]
        storage.UnRegister(None)
        return extensions

    def extractKnownExtension(self, filename: str, node: Any = None) -> str:
        name = str(filename).lower()
        known = [extension for extension in _EXTENSIONS if name.endswith(extension)]
        return max(known, key=len, default=os.path.splitext(name)[1])

    def saveNodes(self, filetype: str, properties: dict[str, Any], messages: Any = None) -> bool:
        path = str(properties["fileName"])
        if filetype == "SceneFile":
            return self._save_scene(path)
        node = slicer.mrmlScene.GetNodeByID(properties["nodeID"])
        storage = node.GetStorageNode()
        if storage is None:
            node.AddDefaultStorageNode()
            storage = node.GetStorageNode()
        storage.SetFileName(path)
        storage.SetUseCompression(int(properties.get("useCompression", storage.GetUseCompression())))
        return bool(storage.WriteData(node))

    def exportNodes(
        self, nodeIDs: Any, fileNames: Any, properties: Any, hardenTransform: bool = False, messages: Any = None
    ) -> bool:
        written = True
        for node_id, path in zip(nodeIDs, fileNames, strict=True):
            node = slicer.mrmlScene.GetNodeByID(node_id)
            storage = node.CreateDefaultStorageNode()
            storage.UnRegister(None)
            storage.SetFileName(str(path))
            written = bool(storage.WriteData(node)) and written
        return written

    def _load_volume(self, path: str, name: str, properties: dict[str, Any]) -> Any:
        label_map, center, single_file, auto_window = 1, 2, 4, 8
        options = label_map * bool(properties.get("labelmap")) + center * bool(properties.get("center"))
        options += single_file * bool(properties.get("singleFile")) + auto_window
        node = slicer.modules.volumes.logic().AddArchetypeVolume(path, name, options)
        if node is not None and properties.get("show", True) and not properties.get("labelmap"):
            selection = slicer.app.applicationLogic().GetSelectionNode()
            selection.SetActiveVolumeID(node.GetID())
            slicer.app.applicationLogic().PropagateVolumeSelection()
        return node

    def _load_segmentation(self, path: str, name: str) -> Any:
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
        node.AddDefaultStorageNode()
        node.GetStorageNode().SetFileName(path)
        if not node.GetStorageNode().ReadData(node):
            slicer.mrmlScene.RemoveNode(node)
            return None
        node.CreateDefaultDisplayNodes()
        return node

    def _load_by_storage_node(self, path: str, name: str, node_class: str, storage_class: str) -> Any:
        if node_class == "vtkMRMLMarkupsFiducialNode":
            node_id = slicer.modules.markups.logic().LoadMarkups(path, name)
            return slicer.mrmlScene.GetNodeByID(node_id) if node_id else None
        node = slicer.mrmlScene.AddNewNodeByClass(node_class, name)
        storage = slicer.mrmlScene.AddNewNodeByClass(storage_class)
        storage.SetFileName(path)
        if not storage.ReadData(node):
            slicer.mrmlScene.RemoveNode(node)
            slicer.mrmlScene.RemoveNode(storage)
            return None
        node.SetAndObserveStorageNodeID(storage.GetID())
        node.CreateDefaultDisplayNodes() if hasattr(node, "CreateDefaultDisplayNodes") else None
        return node

    def _load_scene(self, path: str, clear: bool) -> bool:
        scene = slicer.mrmlScene
        if path.lower().endswith(".mrb"):
            return bool(scene.ReadFromMRB(path, clear))
        scene.SetURL(path)
        return bool(scene.Connect() if clear else scene.Import())

    def _save_scene(self, path: str) -> bool:
        scene = slicer.mrmlScene
        if path.lower().endswith(".mrb"):
            return bool(scene.WriteToMRB(path, None))
        if path.lower().endswith(".mrml"):
            scene.SetURL(path)
            scene.SetRootDirectory(str(Path(path).parent))
            return bool(scene.Commit(path))
        os.makedirs(path, exist_ok=True)
        return bool(slicer.app.applicationLogic().SaveSceneToSlicerDataBundleDirectory(path, None))

    def _node_name(self, path: str) -> str:
        name = os.path.basename(path)
        extension = self.extractKnownExtension(path)
        return name[: len(name) - len(extension)] if extension else name

    def _say(self, messages: Any, text: str) -> None:
        if messages is not None:
            messages.AddMessage(0x00010001, text)
