# `cmake --install`: the library and its header, and how other projects find them: as a CMake package
# (find_package(flash_kda), target flash_kda::flashkda) and with pkg-config (flash_kda.pc). Both may be moved
# together with the folder that they are installed into.
include(CMakePackageConfigHelpers)
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/flash_kda)

install(TARGETS flashkda EXPORT flash_kda LIBRARY COMPONENT runtime NAMELINK_COMPONENT devel)
install(FILES include/flash_kda.h TYPE INCLUDE COMPONENT devel)
if(TARGET flash-kda)
  file(RELATIVE_PATH library_from_command /${CMAKE_INSTALL_BINDIR} /${CMAKE_INSTALL_LIBDIR})
  set_target_properties(flash-kda PROPERTIES INSTALL_RPATH "$ORIGIN/${library_from_command}")
  install(TARGETS flash-kda RUNTIME COMPONENT runtime)
endif()

install(EXPORT flash_kda NAMESPACE flash_kda:: FILE flash_kda-config.cmake DESTINATION ${package_folder}
  COMPONENT devel)
write_basic_package_version_file(flash_kda-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flash_kda-config-version.cmake DESTINATION ${package_folder}
  COMPONENT devel)

# A path relative to the .pc file, unless the user asked for a library folder with a path of its own.
if(IS_ABSOLUTE ${CMAKE_INSTALL_LIBDIR})
  set(pc_prefix ${CMAKE_INSTALL_PREFIX})
  set(pc_libdir ${CMAKE_INSTALL_LIBDIR})
else()
  file(RELATIVE_PATH prefix_from_pc /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
  set(pc_prefix "\${pcfiledir}/${prefix_from_pc}")
  set(pc_libdir "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
endif()
set(pc_includedir ${CMAKE_INSTALL_INCLUDEDIR})
if(NOT IS_ABSOLUTE ${CMAKE_INSTALL_INCLUDEDIR})
  set(pc_includedir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()
configure_file(cmake/flash_kda.pc.in flash_kda.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flash_kda.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig
  COMPONENT devel)
