# slicer_add_python_unittest(SCRIPT <file> [SLICER_ARGS <argument>...] [TESTNAME_PREFIX <prefix>])
# slicer_add_python_test(SCRIPT <file> [SCRIPT_ARGS ...] [SLICER_ARGS ...] [TESTNAME_PREFIX <prefix>])
#
# The tests are recorded in stand_in_tests.txt, one name a line; running them is Slicer's part.
function(stand_in_record_test name)
  file(APPEND "${CMAKE_BINARY_DIR}/stand_in_tests.txt" "${name}\n")
endfunction()

macro(slicer_add_python_unittest)
  stand_in_python_test(${ARGN})
endmacro()

macro(slicer_add_python_test)
  stand_in_python_test(${ARGN})
endmacro()

function(stand_in_python_test)
  cmake_parse_arguments(_test "" "TESTNAME_PREFIX;SCRIPT" "SLICER_ARGS;SCRIPT_ARGS" ${ARGN})
  if(_test_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "slicer_add_python_unittest does not know: ${_test_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/${_test_SCRIPT}")
    message(FATAL_ERROR "A test names a script that is not there: ${CMAKE_CURRENT_SOURCE_DIR}/${_test_SCRIPT}")
  endif()
  get_filename_component(_test_name "${_test_SCRIPT}" NAME_WE)
  stand_in_record_test("py_${_test_TESTNAME_PREFIX}${_test_name}")
endfunction()
