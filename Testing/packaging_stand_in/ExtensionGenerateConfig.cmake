# Slicer writes <Extension>Config.cmake here, for extensions that link to this one; a scripted one has nothing to link.
if(NOT "${EXTENSION_NAME}" STREQUAL "${PROJECT_NAME}")
  message(FATAL_ERROR "The extension is named ${EXTENSION_NAME}, its project ${PROJECT_NAME}")
endif()
