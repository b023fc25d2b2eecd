# Stands in for UseSlicer.cmake: the macros a scripted extension calls, and BUILD_TESTING.
include(CTest)
include("${CMAKE_CURRENT_LIST_DIR}/ScriptedModule.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/PythonTests.cmake")

set(EXTENSION_NAME "${PROJECT_NAME}")
file(REMOVE "${CMAKE_BINARY_DIR}/stand_in_tests.txt" "${CMAKE_BINARY_DIR}/stand_in_metadata.txt")
