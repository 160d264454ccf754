# The Python package finds its shared library and the flash-kda command beside its modules.
#   pip install .          scikit-build-core installs both into the package (SKBUILD is set).
#   a plain CMake build    <build folder>/python is importable: links to the modules and to what was built.
if(SKBUILD)
  # One real file: a wheel holds no links, and the package loads the library by its full name.
  set_property(TARGET flashkda PROPERTY VERSION)
  set_property(TARGET flashkda PROPERTY SOVERSION)
  install(TARGETS flashkda LIBRARY DESTINATION flash_kda COMPONENT python)
  install(FILES include/flash_kda.h DESTINATION flash_kda/include COMPONENT python)
  install(FILES python/flash_kda_command.py DESTINATION . COMPONENT python)
  if(TARGET flash-kda)
    set_target_properties(flash-kda PROPERTIES INSTALL_RPATH "$ORIGIN")
    install(TARGETS flash-kda RUNTIME DESTINATION flash_kda COMPONENT python)
  endif()
  return()
endif()

set(package ${CMAKE_CURRENT_BINARY_DIR}/python/flash_kda)
file(GLOB modules CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/python/flash_kda/*.py
  ${CMAKE_CURRENT_SOURCE_DIR}/python/flash_kda/py.typed)
file(REMOVE_RECURSE ${package})
file(MAKE_DIRECTORY ${package})
foreach(module IN LISTS modules)
  get_filename_component(name ${module} NAME)
  file(CREATE_LINK ${module} ${package}/${name} SYMBOLIC)
endforeach()
foreach(name libflashkda.so flash-kda)
  file(CREATE_LINK ${CMAKE_CURRENT_BINARY_DIR}/${name} ${package}/${name} SYMBOLIC)
endforeach()
