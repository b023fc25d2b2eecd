# slicerMacroBuildScriptedModule(NAME <name> SCRIPTS <file>... RESOURCES <file>... [WITH_SUBDIR] [WITH_GENERIC_TESTS])
#
# Every listed file is copied into the build tree's folder of scripted modules (with WITH_SUBDIR: into a folder there,
# named as the source folder), and that folder as a whole is installed. So a file listed as ../Other/x.py lands outside
# of it and is not installed; the same happens in Slicer.
macro(slicerMacroBuildScriptedModule)
  cmake_parse_arguments(_module "WITH_GENERIC_TESTS;WITH_SUBDIR;VERBOSE" "NAME" "SCRIPTS;RESOURCES" ${ARGN})
  if(_module_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "slicerMacroBuildScriptedModule does not know: ${_module_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT _module_NAME)
    message(FATAL_ERROR "slicerMacroBuildScriptedModule needs NAME")
  endif()

  set(_module_folder "${CMAKE_BINARY_DIR}/${Slicer_QTSCRIPTEDMODULES_LIB_DIR}")
  # The closing slash installs what is in the folder; without it, the folder itself.
  set(_module_installed "${_module_folder}/")
  if(_module_WITH_SUBDIR)
    get_filename_component(_module_subdirectory "${CMAKE_CURRENT_SOURCE_DIR}" NAME)
    set(_module_folder "${_module_folder}/${_module_subdirectory}")
    set(_module_installed "${_module_folder}")
  endif()

  foreach(_module_file IN LISTS _module_SCRIPTS _module_RESOURCES)
    # A script may be listed without its .py.
    if(NOT EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/${_module_file}")
      string(APPEND _module_file ".py")
    endif()
    if(NOT EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/${_module_file}")
      message(FATAL_ERROR "slicerMacroBuildScriptedModule(${_module_NAME}) lists a file that is not there: ${_module_file}")
    endif()
    configure_file("${CMAKE_CURRENT_SOURCE_DIR}/${_module_file}" "${_module_folder}/${_module_file}" COPYONLY)
  endforeach()

  install(
    DIRECTORY "${_module_installed}"
    DESTINATION "${Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR}"
    COMPONENT Runtime
    )

  if(BUILD_TESTING AND _module_WITH_GENERIC_TESTS)
    stand_in_record_test("py_nomainwindow_qSlicer${_module_NAME}ModuleGenericTest")
  endif()
endmacro()
